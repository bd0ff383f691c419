"""How much there is to see in an image: plain ones little, documents, noise and photographs much."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from promprune_vllm.core.content_levels import CELLS, busy_share, content_level
from promprune_vllm.core.load_levels import LEVELS
from promprune_vllm.demo.images import noise, page, photo, slide

content = pytest.importorskip("promprune_vllm.engine.api_server.image_complexity")


@pytest.mark.parametrize(
    ("image", "level"),
    [
        (photo("astronaut"), Fraction(1)),
        (photo("chelsea"), Fraction(1)),
        (photo("coffee"), Fraction(1)),
        (photo("rocket"), Fraction(1, 2)),  # half of it is sky
        (Image.new("RGB", (1024, 1024), (90, 120, 200)), Fraction(1, 8)),
        (Image.linear_gradient("L").convert("RGB"), Fraction(1, 8)),
        (noise(4), Fraction(1, 8)),  # the noise of a camera
        (noise(80), Fraction(1)),
        (page(60, 90), Fraction(1)),
        (slide(), Fraction(1, 4)),
        (page(12, 40), Fraction(1, 8)),
    ],
    ids=[
        "astronaut",
        "chelsea",
        "coffee",
        "rocket",
        "flat",
        "gradient",
        "grain",
        "noise",
        "page",
        "slide",
        "note",
    ],
)
def test_images_get_the_level_that_was_measured_for_them(image: Image.Image, level: Fraction) -> None:
    assert content.level(image) == level


@given(st.integers(0, CELLS * CELLS))
def test_there_is_room_for_every_busy_cell_and_only_the_known_levels(busy: int) -> None:
    share = Fraction(busy, CELLS * CELLS)
    assert content_level(share) in LEVELS
    assert content_level(share) >= min(share, Fraction(1, 2)) or content_level(share) == 1
    assert content_level(share) <= content_level(min(share + Fraction(1, CELLS * CELLS), Fraction(1)))


def test_arrays_and_tensors_are_read_as_the_picture_they_hold() -> None:
    picture = photo("astronaut")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    shares = [
        float(busy_share(content.sample_brightness(each))) for each in (picture, array, tensor, tensor / 255)
    ]
    assert max(shares) - min(shares) < 0.03
    assert content.level(None) == 1


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "L", "P", "CMYK", "1"])
def test_a_picture_of_any_mode_has_the_level_of_what_the_model_sees(mode: str) -> None:
    """vLLM's loader converts it to RGB; of 16 bits it clips all that is brighter than 255 of 65,535."""
    grey = photo("astronaut").convert("L")
    bright = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    picture = bright.convert(mode) if mode in {"I;16", "I", "F"} else grey.convert("RGB").convert(mode)
    assert content.level(picture) == content.level(picture.convert("RGB"))
    assert (content.level(picture) < 1) == (mode in {"I;16", "I", "F"})


def test_a_megapixel_takes_a_moment_only() -> None:
    image = noise(80)
    content.level(image)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        content.level(image)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.002


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        busy_share(torch.zeros(10, 10))
