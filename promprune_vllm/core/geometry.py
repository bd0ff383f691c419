"""Pixel box of each visual token, in the pixels of the image as it was sent."""

from __future__ import annotations

import math

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edges, in pixels of the image as it was sent."""


def grid(rows: int, columns: int, area: Box) -> list[Box]:
    """Divide an area into a grid of equal boxes, listed row by row."""
    left, top, right, bottom = area
    across = [left + (right - left) * column / columns for column in range(columns + 1)]
    down = [top + (bottom - top) * row / rows for row in range(rows + 1)]
    return [
        (across[column], down[row], across[column + 1], down[row + 1])
        for row in range(rows)
        for column in range(columns)
    ]


def centre_crop(width: int, height: int, *, shortest: int, crop: int) -> Box:
    """Return the area left by resizing the shorter side to ``shortest`` and center-cropping ``crop`` x ``crop``.

    A crop larger than the resized image has a black border: the area then extends beyond the image.
    """
    side = crop * min(width, height) / shortest
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def padded(width: int, height: int, canvas: tuple[int, int]) -> Box:
    """Return the area of a canvas that an image is centered in, as large as fits: in pixels of the image.

    Args:
        width, height: Size of the image.
        canvas: Width and height, including the black bars around the image.
    """
    across, down = canvas[0] / width, canvas[1] / height
    if across < down:
        fitted = (canvas[0], min(math.ceil(height * across), canvas[1]))
    else:
        fitted = (min(math.ceil(width * down), canvas[0]), canvas[1])
    left, top = (canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2
    scale = (width / fitted[0], height / fitted[1])
    return (-left * scale[0], -top * scale[1], (canvas[0] - left) * scale[0], (canvas[1] - top) * scale[1])


def rounded(box: Box) -> Box:
    """Return a box rounded to a hundredth of a pixel."""
    left, top, right, bottom = (round(edge, 2) for edge in box)
    return (left, top, right, bottom)


def clipped(box: Box, width: int, height: int) -> Box:
    """Return the part of a box that lies on the image."""
    left, top, right, bottom = box
    return (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
