"""What the trainer gets of a scene: its patches, what each of them shows, and its questions packed in one row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promprune_vllm.demo.scenes import TASKS, Question, Scene
from promprune_vllm.demo.scenes.questions import shown
from promprune_vllm.demo.scenes.record import COLOURS, GRID, PATCH, PIXELS, SHAPES, Thing
from promprune_vllm.demo.training import tokenizer

TEXT_TOKENS = 176  # of all questions of a scene together; what does not fit is not asked
NONE = -1  # no label
TASK_IDS = {task: i for i, task in enumerate((*TASKS, "which-image"))}
LABELS = ("shape", "colour", "digit", "rank", "centre")  # columns of Sample.labels
NAMES = (*(f"{colour} {what}" for what in (*SHAPES, "card") for colour in COLOURS), "plate")
_WHATS = (*SHAPES, "card", "plate")
_NEAR_PX = 10.0  # a patch whose centre is so near the centre of a small thing must tell what it is
_NEAR_SHARE = 0.36  # ... of a large thing, so near as a share of its size
_CENTRES = (np.arange(GRID) + 0.5) * PATCH
_BACKGROUND_SHARE = 0.1  # of the patches without a thing that must tell so


@dataclass(frozen=True, slots=True)
class Sample:
    """One scene, as bytes and small integers.

    Args:
        patches: ``(576, 588)`` uint8, each patch as the tower's convolution reads it: channel, row, column.
        held: ``(576,)`` bool, patches that hold a part of a thing.
        labels: ``(576, 5)`` int8, `LABELS`, or `NONE` where a patch need not tell.
        shown: ``(58,)`` uint8, which coloured shapes and which digits there are.
        named: ``(55,)`` uint8, which of `NAMES` there are.
        text: ``(5, TEXT_TOKENS)`` int16, see `pack`.
    """

    patches: NDArray[np.uint8]
    held: NDArray[np.bool_]
    labels: NDArray[np.int8]
    shown: NDArray[np.uint8]
    named: NDArray[np.uint8]
    text: NDArray[np.int16]


def sample(scene: Scene) -> Sample:
    """Render and label a scene."""
    pixels = np.asarray(scene.image())
    patches = pixels.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(GRID * GRID, -1)
    rng = Random(f"{scene.split}/{scene.kind}/{scene.seed}/labels")
    held, labels = _labels(scene.things, rng)
    there = shown(scene.things)
    named = np.array([name in there for name in NAMES], dtype=np.uint8)
    text = pack(scene.questions())
    return Sample(np.ascontiguousarray(patches), held, labels, _class_targets(scene.things), named, text)


def pack(questions: tuple[Question, ...] | list[Question]) -> NDArray[np.int16]:
    """Write questions and answers one after another.

    Returns:
        ``(5, TEXT_TOKENS)``: token, position after the image, number of the question (`NONE` is padding), next
        token to be learnt (`NONE` is not), and the task's id where the answer is next, else `NONE`.
    """
    rows = np.full((5, TEXT_TOKENS), NONE, dtype=np.int16)
    rows[:2] = 0
    begin = 0
    for number, question in enumerate(questions):
        asked, answer = token_ids(question.text), token_ids(question.answer)
        if len(answer) != 1:
            raise ValueError(f"{question.answer!r} is not one token")
        tokens = [*asked, _assistant_id(), *answer]
        end = begin + len(tokens)
        if end > TEXT_TOKENS:
            continue
        rows[0, begin:end] = tokens
        rows[1, begin:end] = np.arange(len(tokens))
        rows[2, begin:end] = number
        rows[3, end - 2 : end] = answer[0], tokenizer.EOS_ID
        rows[4, end - 2] = TASK_IDS[question.task]
        begin = end
    return rows


@cache
def _tokenizer() -> Any:
    return tokenizer.tokenizer()


@cache
def token_ids(text: str) -> tuple[int, ...]:
    """The tokens of a text."""
    return tuple(_tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
def _assistant_id() -> int:
    return token_ids(tokenizer.ASSISTANT)[0]


def _labels(things: tuple[Thing, ...], rng: Random) -> tuple[NDArray[np.bool_], NDArray[np.int8]]:
    held = np.zeros((GRID, GRID), dtype=bool)
    labels = np.full((GRID, GRID, len(LABELS)), NONE, dtype=np.int8)
    glyphs = [thing for thing in things if thing.what == "glyph"]
    for thing in things:
        across, down = np.abs(_CENTRES - thing.x), np.abs(_CENTRES - thing.y)
        held |= (down < thing.height / 2 + 3)[:, None] & (across < thing.width / 2 + 3)[None, :]
        reach = [max(_NEAR_PX, _NEAR_SHARE * side) for side in (thing.width, thing.height)]
        near = (down <= reach[1])[:, None] & (across <= reach[0])[None, :]
        if thing.what != "glyph":
            labels[near, 0] = _WHATS.index(thing.what)
            labels[near, 4] = 0
        if thing.colour:
            labels[near, 1] = COLOURS.index(thing.colour)
        if thing.digit >= 0:
            labels[near, 2] = thing.digit
        if thing.what == "glyph":
            labels[near, 3] = 0 if thing is glyphs[0] else 2 if thing is glyphs[-1] else 1
    for patch in rng.sample(range(GRID * GRID), int(_BACKGROUND_SHARE * GRID * GRID)):
        if not held.flat[patch]:
            labels[patch // GRID, patch % GRID, 4] = 0
    for thing in things:
        if thing.what not in ("glyph", "plate"):
            labels[int(min(thing.y, PIXELS - 1) // PATCH), int(min(thing.x, PIXELS - 1) // PATCH), 4] = 1
    return held.ravel(), labels.reshape(-1, len(LABELS))


def _class_targets(things: tuple[Thing, ...]) -> NDArray[np.uint8]:
    targets = np.zeros(len(SHAPES) * len(COLOURS) + 10, dtype=np.uint8)
    for thing in things:
        if thing.what in SHAPES:
            targets[SHAPES.index(thing.what) * len(COLOURS) + COLOURS.index(thing.colour)] = 1
        if thing.digit >= 0:
            targets[len(SHAPES) * len(COLOURS) + thing.digit] = 1
    return targets
