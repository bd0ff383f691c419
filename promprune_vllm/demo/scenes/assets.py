"""Handwritten digits and photographs, divided between the splits."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from promprune_vllm.demo import PHOTOS, photo_path

# Pictures packaged with scikit-image that look like surfaces or views, and none of the demo's own four.
TRAINING_PHOTOS = (
    "brick.png",
    "camera.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
)
_HELD_OUT_EVERY = 5  # of five digits of the data set, one is held out
_LONGEST_SIDE = 640


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    with np.load(str(files(__package__) / "digits.npz")) as stored:
        return stored["images"], stored["labels"]


@cache
def digit_samples(split: str) -> tuple[tuple[int, ...], ...]:
    """Which samples of the data set each digit 0 to 9 may be drawn with in a split."""
    _, labels = _digits()
    held_out = np.arange(len(labels)) % _HELD_OUT_EVERY == 0
    mine = held_out if split == "held-out" else ~held_out
    return tuple(tuple(np.flatnonzero(mine & (labels == digit)).tolist()) for digit in range(10))


@lru_cache(maxsize=2048)
def digit_image(sample: int) -> Image.Image:
    """One handwritten digit as a mask, (8, 8) px of 0 (paper) to 255 (ink), with a border of one empty pixel."""
    images, _ = _digits()
    ink = np.minimum(images[sample].astype(np.uint16) * 16, 255).astype(np.uint8)
    return Image.fromarray(np.pad(ink, 1))


@cache
def photo_names(split: str) -> tuple[str, ...]:
    """The photographs of a split; those for training come with the package's extra `train`."""
    return PHOTOS if split == "held-out" else TRAINING_PHOTOS


@cache
def photo(split: str, name: str) -> Image.Image:
    """One photograph, RGB, at most `_LONGEST_SIDE` px long.

    Raises:
        ModuleNotFoundError: It is one for training, and scikit-image is not installed.
    """
    if split == "held-out":
        path = photo_path(name)
    else:
        spec = find_spec("skimage")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                "Training backgrounds are pictures of scikit-image: pip install 'promprune-vllm[train]'"
            )
        path = Path(spec.origin).parent / "data" / name
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture
