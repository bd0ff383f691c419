"""The demo: photographs, generated scenes, small models, and the code that serves and queries them."""

from importlib.resources import files
from pathlib import Path

PHOTOS: tuple[str, ...] = ("astronaut", "coffee", "chelsea", "rocket")


def photo_path(name: str) -> Path:
    """Return the JPEG file of one of `PHOTOS`."""
    if name not in PHOTOS:
        raise ValueError(f"no photo is called {name!r}; there are {', '.join(PHOTOS)}")
    return Path(str(files(__package__) / "photos" / f"{name}.jpg"))
