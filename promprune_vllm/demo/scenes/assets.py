"""Handwritten digits and photographs of each split."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from promprune_vllm.demo import PHOTOS, photo_path

# Pictures from scikit-image that look like surfaces or views; none of the demo's own four.
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
_HELD_OUT_EVERY = 5  # every fifth digit of the data set is held out
_LONGEST_SIDE = 640


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    with np.load(str(files(__package__) / "digits.npz")) as stored:
        return stored["images"], stored["labels"]


@cache
def digit_samples(split: str) -> tuple[tuple[int, ...], ...]:
    """Return the indices of a split's samples in the data set, for each digit 0 to 9."""
    _, labels = _digits()
    held_out = np.arange(len(labels)) % _HELD_OUT_EVERY == 0
    mine = held_out if split == "held-out" else ~held_out
    return tuple(tuple(np.flatnonzero(mine & (labels == digit)).tolist()) for digit in range(10))


@lru_cache(maxsize=2048)
def digit_image(sample: int) -> Image.Image:
    """Return a handwritten digit as a mask: (8, 8) px of 0 (paper) to 255 (ink), plus a border of one pixel."""
    images, _ = _digits()
    ink = np.minimum(images[sample].astype(np.uint16) * 16, 255).astype(np.uint8)
    return Image.fromarray(np.pad(ink, 1))


@cache
def photo_names(split: str) -> tuple[str, ...]:
    """Return the photographs of a split; those for training need the package's extra `train`."""
    return PHOTOS if split == "held-out" else TRAINING_PHOTOS


@cache
def photo(split: str, name: str) -> Image.Image:
    """Return a photograph, RGB, with at most `_LONGEST_SIDE` px per side.

    Raises:
        ModuleNotFoundError: It is a training photograph, and scikit-image is not installed.
    """
    if split == "held-out":
        path = photo_path(name)
    else:
        spec = find_spec("skimage")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                "Training backgrounds come from scikit-image: pip install 'promprune-vllm[train]'"
            )
        path = Path(spec.origin).parent / "data" / name
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture
