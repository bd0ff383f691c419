"""Where on an image its visual tokens look: rectangles in the image's own pixels."""

from __future__ import annotations

import math

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels of the image as it was sent."""


def grid(rows: int, columns: int, area: Box) -> list[Box]:
    """Divide an area evenly; row by row."""
    left, top, right, bottom = area
    across = [left + (right - left) * column / columns for column in range(columns + 1)]
    down = [top + (bottom - top) * row / rows for row in range(rows + 1)]
    return [
        (across[column], down[row], across[column + 1], down[row + 1])
        for row in range(rows)
        for column in range(columns)
    ]


def centre_crop(width: int, height: int, *, shortest: int, crop: int) -> Box:
    """What is left of an image whose shorter side becomes ``shortest`` and of which ``crop`` x ``crop`` is cut.

    A crop larger than the resized image shows black around it: the area then reaches beyond the image.
    """
    side = crop * min(width, height) / shortest
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def padded(width: int, height: int, canvas: tuple[int, int]) -> Box:
    """Where a canvas lies that an image was put in the middle of, as large as fits: in pixels of the image.

    Args:
        width, height: Of the image.
        canvas: Width and height, with the black bars around the image.
    """
    across, down = canvas[0] / width, canvas[1] / height
    if across < down:
        shown = (canvas[0], min(math.ceil(height * across), canvas[1]))
    else:
        shown = (min(math.ceil(width * down), canvas[0]), canvas[1])
    left, top = (canvas[0] - shown[0]) // 2, (canvas[1] - shown[1]) // 2
    scale = (width / shown[0], height / shown[1])
    return (-left * scale[0], -top * scale[1], (canvas[0] - left) * scale[0], (canvas[1] - top) * scale[1])


def rounded(box: Box) -> Box:
    """Return a rectangle to a hundredth of a pixel."""
    left, top, right, bottom = (round(edge, 2) for edge in box)
    return (left, top, right, bottom)


def clipped(box: Box, width: int, height: int) -> Box:
    """Return the part of a rectangle that lies on the image."""
    left, top, right, bottom = box
    return (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
