"""Makes a scene from a seed: its picture, its questions, and the patches that matter."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from promprune_vllm.demo.scenes.backgrounds import (
    BACKGROUNDS,
    CONCENTRATED_WEIGHTS,
    SCATTERED_WEIGHTS,
    background,
)
from promprune_vllm.demo.scenes.drawing import cover, draw
from promprune_vllm.demo.scenes.layout import concentrated_things, scattered_things
from promprune_vllm.demo.scenes.questions import concentrated_questions, scattered_questions, shown
from promprune_vllm.demo.scenes.record import HELD, KINDS, PATCH, PIXELS, SPLITS, Question, Thing


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene; its picture is the same on any machine.

    Args:
        kind: One of `KINDS`: many things all over the picture, or one large thing.
        seed: Seed of the scene.
        split: One of `SPLITS`.
        things: Everything drawn on the background, in this order.
        backdrop: The kind of background.
        counted: The shape and the color that "count" questions ask for; empty in a concentrated scene.
    """

    kind: str
    seed: int
    split: str
    things: tuple[Thing, ...]
    backdrop: str
    counted: tuple[str, ...]

    def image(self) -> Image.Image:
        """Return the picture, RGB, `PIXELS` per side."""
        generator = np.random.default_rng(Random(self._key("paint")).getrandbits(64))
        canvas = background(self.backdrop, generator, self.split)
        for thing in self.things:
            draw(canvas, thing)
        return canvas

    def questions(self) -> tuple[Question, ...]:
        """Return all its questions, in an order that depends only on the seed."""
        rng = Random(self._key("ask"))
        if self.kind == "scattered":
            return tuple(scattered_questions(rng, self.things, *self.counted))
        return tuple(concentrated_questions(rng, self.things))

    def mask(self, *, faces: bool = True) -> NDArray[np.bool_]:
        """Return a (24, 24) mask of the patches, top row first, that are covered by things.

        Args:
            faces: Whether the whole face of a plate counts; otherwise only its digits.
        """
        covered = Image.new("L", (PIXELS, PIXELS))
        for thing in self.things:
            if thing.what != ("glyph" if faces else "plate"):
                cover(covered, thing)
        return np.asarray(covered.reduce(PATCH)) >= 255 * HELD

    def _key(self, purpose: str) -> str:
        return _key(self.kind, self.seed, self.split, purpose)


def _key(kind: str, seed: int, split: str, purpose: str) -> str:
    return f"{split}/{kind}/{seed}/{purpose}"


def make_scene(kind: str, seed: int, split: str = "held-out") -> Scene:
    """Return the scene of a kind, a seed and a split."""
    if kind not in KINDS or split not in SPLITS:
        raise ValueError(f"no scene is {kind!r} and {split!r}: kinds are {KINDS}, splits {SPLITS}")
    rng = Random(_key(kind, seed, split, "compose"))
    counted: tuple[str, ...] = ()
    if kind == "scattered":
        things, *counted_names = scattered_things(rng, split)
        counted, weights = tuple(counted_names), SCATTERED_WEIGHTS
    else:
        things, weights = concentrated_things(rng, split), CONCENTRATED_WEIGHTS
    (backdrop,) = rng.choices(BACKGROUNDS, weights)
    return Scene(kind, seed, split, things, backdrop, counted)


def pair_question(first: Scene, second: Scene) -> Question:
    """Return a question about two images, `first` before `second`: which of them shows a thing.

    Raises:
        ValueError: Both scenes show the same things.
    """
    rng = Random(f"{first._key('pair')}/{second._key('pair')}")
    in_first, in_second = shown(first.things), shown(second.things)
    sides = [("first", sorted(in_first - in_second)), ("second", sorted(in_second - in_first))]
    rng.shuffle(sides)
    for answer, names in sides:
        if names:
            return Question("which-image", f"which image shows a {rng.choice(names)}?", answer)
    raise ValueError(f"the scenes {first.seed} and {second.seed} show the same things")
