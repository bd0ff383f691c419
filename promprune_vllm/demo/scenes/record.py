"""Data types of scenes: things, questions, and the vocabulary of both."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("scattered", "concentrated")
SPLITS = ("train", "held-out")
SCATTERED_TASKS = ("presence", "count", "colour", "digit", "where", "relation")
CONCENTRATED_TASKS = ("big-shape", "big-colour", "plate")
TASKS = SCATTERED_TASKS + CONCENTRATED_TASKS
PIXELS = 336
PATCH = 14  # side of a patch of the vision tower, in pixels
GRID = PIXELS // PATCH  # patches a side
HELD = 0.25  # a patch counts as part of a thing if things cover at least this share of it

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
HUES = {"red": 0, "yellow": 54, "green": 120, "cyan": 180, "blue": 228, "purple": 290}  # degrees
COLOURS = tuple(HUES)
QUARTERS = ("top-left", "top-right", "bottom-left", "bottom-right")
MAX_COUNT = 4


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing in a scene.

    Args:
        what: A shape, "card" (a colored card with one digit), "plate", or "glyph" (a digit on a plate).
        colour: Name of its color; "" for a plate, the ink's color for a glyph.
        x: Center, in pixels from the left edge.
        y: Center, in pixels from the top.
        width: Width in pixels.
        height: Height in pixels.
        turn: Rotation in degrees.
        rgb: Exact color.
        sample: Index of the handwritten digit in the data set, for a card or a glyph.
        digit: Value of that digit, 0 to 9.
    """

    what: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    turn: float = 0.0
    rgb: tuple[int, int, int] = (0, 0, 0)
    sample: int = -1
    digit: int = -1

    @property
    def name(self) -> str:
        """Its name in questions, such as "red star"."""
        return f"{self.colour} {self.what}"


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a scene.

    Args:
        task: One of `TASKS`, or "which-image" about two scenes.
        text: Text that is sent to a server.
        answer: The only right answer: a word or a digit, in lower case.
    """

    task: str
    text: str
    answer: str
