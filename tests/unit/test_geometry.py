"""Where tokens look on an image: rectangles, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promprune_vllm.core.geometry import centre_crop, clipped, grid, padded, rounded

sides = st.integers(1, 5000)


def test_a_grid_goes_row_by_row() -> None:
    assert grid(2, 3, (10, 20, 40, 40)) == [
        *((10, 20, 20, 30), (20, 20, 30, 30), (30, 20, 40, 30)),
        *((10, 30, 20, 40), (20, 30, 30, 40), (30, 30, 40, 40)),
    ]


@given(sides, sides, st.integers(1, 40), st.integers(1, 40))
def test_a_grid_leaves_no_gap(width: int, height: int, rows: int, columns: int) -> None:
    boxes = grid(rows, columns, (0, 0, width, height))
    assert len(boxes) == rows * columns
    assert boxes[0][:2] == (0, 0)
    assert boxes[-1][2:] == (width, height)
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    assert area == pytest.approx(width * height)


@pytest.mark.parametrize(
    ("size", "crop", "area"),
    [
        ((600, 400), 336, (100, 0, 500, 400)),  # landscape: the sides are cut off
        ((400, 600), 336, (0, 100, 400, 500)),
        ((336, 336), 336, (0, 0, 336, 336)),
        ((672, 672), 168, (168, 168, 504, 504)),  # a crop of half the resized side
        ((100, 100), 672, (-50, -50, 150, 150)),  # a crop larger than the image: black around it
    ],
)
def test_the_square_in_the_middle(size: tuple[int, int], crop: int, area: tuple[int, ...]) -> None:
    assert centre_crop(*size, shortest=336, crop=crop) == pytest.approx(area)


def test_bars_around_an_image_lie_outside_of_it() -> None:
    # 600 x 400 on 672 x 672: as large as fits is 672 x 448 (or 449, as Hugging Face rounds), with bars of 112.
    assert padded(600, 400, (672, 672)) == pytest.approx((0, -100, 600, 500), abs=2)
    assert padded(400, 600, (672, 672)) == pytest.approx((-100, 0, 500, 600), abs=2)
    assert padded(672, 336, (672, 336)) == pytest.approx((0, 0, 672, 336))


@given(sides, sides, st.sampled_from([(336, 672), (672, 336), (672, 672), (1008, 336)]))
def test_a_canvas_holds_all_of_the_image(width: int, height: int, canvas: tuple[int, int]) -> None:
    left, top, right, bottom = padded(width, height, canvas)
    assert left <= 0
    assert top <= 0
    assert right >= width - 1e-6
    assert bottom >= height - 1e-6


def test_what_is_told_lies_on_the_image() -> None:
    assert clipped((-5, 3, 20.123, 50), 15, 40) == (0, 3, 15, 40)
    assert rounded((0.123456, 1, 2.999, 4)) == (0.12, 1, 3.0, 4)
