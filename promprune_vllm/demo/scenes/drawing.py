"""Draws things with smooth edges."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from promprune_vllm.demo.scenes.assets import digit_image
from promprune_vllm.demo.scenes.record import Thing

_OVERSAMPLING = 3


def draw(canvas: Image.Image, thing: Thing) -> None:
    """Draw a thing on an RGB canvas."""
    if thing.what == "glyph":
        _draw_digit(canvas, thing, thing.rgb, side=1.25 * thing.width)
        return
    mask = _mask(thing)
    canvas.paste(thing.rgb, _box(thing, mask), mask)
    if thing.what == "card":
        _draw_digit(canvas, thing, _readable_on(thing.rgb), side=thing.width)


def cover(canvas: Image.Image, thing: Thing) -> None:
    """Fill a thing's area with white on a gray canvas; a digit's area is its square."""
    mask = _mask(thing)
    canvas.paste(255, _box(thing, mask), mask)


def _mask(thing: Thing) -> Image.Image:
    return _rounded(thing) if thing.what in ("card", "plate", "glyph") else _shape(thing)


def _box(thing: Thing, mask: Image.Image) -> tuple[int, int, int, int]:
    left, top = round(thing.x - mask.width / 2), round(thing.y - mask.height / 2)
    return left, top, left + mask.width, top + mask.height


def _readable_on(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = rgb
    return (0, 0, 0) if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else (255, 255, 255)


def _draw_digit(canvas: Image.Image, thing: Thing, ink: tuple[int, int, int], *, side: float) -> None:
    mask = digit_image(thing.sample).resize((round(side), round(side)), Image.Resampling.BICUBIC)
    if thing.turn:
        mask = mask.rotate(thing.turn, Image.Resampling.BILINEAR)
    canvas.paste(ink, _box(thing, mask), mask)


def _rounded(thing: Thing) -> Image.Image:
    width, height = round(thing.width), round(thing.height)
    mask = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    box = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius=4 * _OVERSAMPLING, fill=255)
    return mask.reduce(_OVERSAMPLING)


def _shape(thing: Thing) -> Image.Image:
    side = round(thing.width)
    mask = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING))
    pen = ImageDraw.Draw(mask)
    full = mask.width - 1
    if thing.what in ("circle", "ring"):
        pen.ellipse((0, 0, full, full), fill=255)
        if thing.what == "ring":
            pen.ellipse((0.27 * full, 0.27 * full, 0.73 * full, 0.73 * full), fill=0)
    else:
        pen.polygon(_corners(thing.what, full, thing.turn), fill=255)
    return mask.reduce(_OVERSAMPLING)


def _corners(shape: str, full: float, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a polygon that fills a square of `full` pixels, rotated about its center."""
    angle = math.radians(turn)
    cosine, sine = math.cos(angle) * full / 2, math.sin(angle) * full / 2
    centre = full / 2
    return [(centre + cosine * x - sine * y, centre + sine * x + cosine * y) for x, y in _OUTLINES[shape]]


def _star() -> list[tuple[float, float]]:
    spikes = [(math.radians(36 * i - 90), 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle, radius in spikes]


def _heart() -> list[tuple[float, float]]:
    turns = [math.radians(10 * i) for i in range(36)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


_ARM = 0.34
_OUTLINES: dict[str, list[tuple[float, float]]] = {  # within [-1, 1] each way, y down
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],
    "star": _star(),
    "cross": [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "heart": _heart(),
}
