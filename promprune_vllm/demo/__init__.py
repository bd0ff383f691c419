"""The demo: photographs and scenes, small models to look at them with, and what serves and asks these."""

from importlib.resources import files
from pathlib import Path

PHOTOS: tuple[str, ...] = ("astronaut", "coffee", "chelsea", "rocket")


def photo_path(name: str) -> Path:
    """The JPEG file of one of `PHOTOS`."""
    if name not in PHOTOS:
        raise ValueError(f"no photo is called {name!r}; there are {', '.join(PHOTOS)}")
    return Path(str(files(__package__) / "photos" / f"{name}.jpg"))
