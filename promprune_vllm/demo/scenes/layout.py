"""Places things in scenes."""

from __future__ import annotations

import colorsys
from random import Random

from promprune_vllm.demo.scenes.assets import digit_samples
from promprune_vllm.demo.scenes.record import COLOURS, HUES, MAX_COUNT, PIXELS, SHAPES, Thing

_BUSY = 0.4  # share of scattered scenes with many small things instead of a few larger ones
_SPARSE = 0.4  # share of training scenes with very few things, on which the model first learns to find one
_GAP = 3.0  # minimum distance between two things, in pixels


def scattered_things(rng: Random, split: str) -> tuple[tuple[Thing, ...], str, str]:
    """Place 6 to 11 shapes of 28-42 px or 18 to 26 of 20-30 px, and two to four cards with one digit each.

    Some training scenes have only three to five shapes and one or two cards.

    Returns:
        The things, and the shape and the color to count; each count from 0 to `MAX_COUNT` is equally likely.
    """
    busy = rng.random() < _BUSY
    sizes = (20.0, 30.0) if busy else (28.0, 42.0)
    total = rng.randint(18, 26) if busy else rng.randint(6, 11)
    most_cards = 4
    if split == "train" and rng.random() < _SPARSE:
        sizes, total, most_cards = (28.0, 42.0), rng.randint(3, 5), 2
    counted_shape, counted_colour = rng.choice(SHAPES), rng.choice(COLOURS)
    kinds = _shapes(rng, total, counted_shape)
    colours = [counted_colour] * min(rng.randint(0, MAX_COUNT), total)
    others = [colour for colour in COLOURS if colour != counted_colour]
    colours += rng.choices(others, k=total - len(colours))
    rng.shuffle(colours)
    cards = rng.sample(COLOURS, rng.randint(most_cards // 2, most_cards))
    taken: list[tuple[float, float, float]] = []
    things = []
    for colour in cards:  # largest first: small things fit in between
        size = rng.uniform(34, 42)
        things.append(_written(rng, split, ("card", colour), _place(rng, taken, size), size))
    for shape, colour in zip(kinds, colours, strict=True):
        size = rng.uniform(*sizes)
        things.append(_painted(rng, (shape, colour), _place(rng, taken, size), size))
    return tuple(things), counted_shape, counted_colour


def _shapes(rng: Random, total: int, counted: str) -> list[str]:
    """Return `total` shapes: `counted` 0 to `MAX_COUNT` times, two others once each, and random others."""
    others = [shape for shape in SHAPES if shape != counted]
    rng.shuffle(others)
    kinds = [counted] * min(rng.randint(0, MAX_COUNT), total - 1)
    kinds += others[: min(2, total - len(kinds))]
    kinds += rng.choices(others[2:], k=total - len(kinds))
    rng.shuffle(kinds)
    return kinds


def concentrated_things(rng: Random, split: str) -> tuple[Thing, ...]:
    """Place one shape of 90-190 px, or one plate of 100-230 px with three to six digits in different colors."""
    if rng.random() < 0.5:
        size = rng.uniform(90, 190)
        x, y = rng.uniform(size / 2, PIXELS - size / 2), rng.uniform(size / 2, PIXELS - size / 2)
        return (_painted(rng, (rng.choice(SHAPES), rng.choice(COLOURS)), (x, y), size),)
    inks = rng.sample(COLOURS, rng.randint(3, 6))
    glyph = rng.uniform(27, 33)  # side of a digit's box; narrow digits fill less of it
    pitch = glyph * rng.uniform(1.0, 1.15)
    width = len(inks) * pitch + rng.uniform(10, 22)
    height = glyph + rng.uniform(10, 60)
    x, y = rng.uniform(width / 2, PIXELS - width / 2), rng.uniform(height / 2, PIXELS - height / 2)
    grey = rng.randint(10, 60)
    things = [Thing("plate", "", x, y, width, height, rgb=(grey, grey, grey + rng.randint(0, 15)))]
    for i, ink in enumerate(inks):
        left = x + (i - (len(inks) - 1) / 2) * pitch
        wobble = rng.uniform(-4, 4)
        things.append(_written(rng, split, ("glyph", ink), (left, y + wobble), glyph))
    return tuple(things)


def placed_among(
    rng: Random, split: str, things: tuple[Thing, ...], what: str, number: int, *, middle: bool = False
) -> list[Thing]:
    """Place more things where there is room between others, each of 34-42 px and of another color.

    Args:
        rng: Source of random numbers.
        split: One of `SPLITS`.
        things: What is there.
        what: "card", or "shape" for any shape.
        number: How many to place, at most as many as there are colors.
        middle: Whether they must be in the middle half of the picture, each way.
    """
    taken = [(thing.x, thing.y, thing.width) for thing in things]
    placed = []
    for colour in rng.sample(COLOURS, number):
        size = rng.uniform(34, 42)
        at = _place(rng, taken, size, margin=PIXELS / 4 if middle else 1)
        name = (what if what == "card" else rng.choice(SHAPES), colour)
        placed.append(_written(rng, split, name, at, size) if what == "card" else _painted(rng, name, at, size))
    return placed


def _place(
    rng: Random, taken: list[tuple[float, float, float]], size: float, margin: float = 1
) -> tuple[float, float]:
    """Return a free position for a square of `size` pixels, or (rarely) the last one tried."""
    x = y = PIXELS / 2
    low, high = size / 2 + margin, PIXELS - size / 2 - margin
    for _ in range(200):
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        reach = [(abs(x - a), abs(y - b), (size + other) / 2 + _GAP) for a, b, other in taken]
        if all(across > room or down > room for across, down, room in reach):
            break
    taken.append((x, y, size))
    return x, y


def _painted(rng: Random, name: tuple[str, str], at: tuple[float, float], size: float) -> Thing:
    shape, colour = name
    return Thing(shape, colour, *at, size, size, turn=rng.uniform(-12, 12), rgb=_rgb(rng, colour))


def _written(rng: Random, split: str, name: tuple[str, str], at: tuple[float, float], size: float) -> Thing:
    what, colour = name
    digit = rng.randrange(10)
    sample = rng.choice(digit_samples(split)[digit])
    turn = rng.uniform(-8, 8)
    rgb = _rgb(rng, colour, lightest=what == "glyph")
    return Thing(what, colour, *at, size, size, turn=turn, rgb=rgb, sample=sample, digit=digit)


def _rgb(rng: Random, colour: str, *, lightest: bool = False) -> tuple[int, int, int]:
    """Return a color of that name; with `lightest`, one that shows as thin lines on a dark plate."""
    hue = (HUES[colour] + rng.uniform(-11, 11)) % 360 / 360
    saturation, value = (0.72, 1.0) if lightest else (rng.uniform(0.7, 1.0), rng.uniform(0.75, 1.0))
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)
