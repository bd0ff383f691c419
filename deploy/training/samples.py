"""Training samples of scenes: patches, a label for each, and the questions packed into one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.training import tokenizer
from promprune_vllm.demo import processing
from promprune_vllm.demo.scenes import TASKS, Question, Scene
from promprune_vllm.demo.scenes.questions import shown
from promprune_vllm.demo.scenes.record import COLOURS, GRID, PATCH, PLURALS, SHAPES, Thing

TEXT_TOKENS = 176  # for all questions of a scene together; questions that do not fit are skipped
NONE = -1  # no label
EDGE = -2  # the edge of a thing
TASK_IDS = {task: i for i, task in enumerate((*TASKS, "which-image"))}
LABELS = ("shape", "colour", "digit", "rank", "centre")  # columns of Sample.labels
NAMES = (*(f"{colour} {what}" for what in (*SHAPES, "card") for colour in COLOURS), "plate")
_WHATS = (*SHAPES, "card", "plate")
_NEAR_PX = 10.0  # patches whose centers are this close to the center of a small thing are labeled with it
_NEAR_SHARE = 0.36  # the same for a large thing, as a share of its size
_CENTRES = (np.arange(GRID) + 0.5) * PATCH
_BACKGROUND_SHARE = 0.1  # share of the patches without a thing that are labeled as such


@dataclass(frozen=True, slots=True)
class Sample:
    """One scene, as bytes and small integers.

    Args:
        patches: ``(576, 588)`` uint8, each patch in the order of the tower's convolution: channel, row, column.
        held: ``(576,)`` bool, patches that contain a part of a thing.
        labels: ``(576, 5)`` int8, `LABELS`, or `NONE` for unlabeled patches. "centre" is in percent: the values of
            one thing's patches add up to 100, weighted by how close they are to its center.
        shown: ``(58,)`` uint8, which colored shapes and which digits are in the scene.
        named: ``(55,)`` uint8, which of `NAMES` are in the scene.
        owner: ``(576,)`` int8, the thing that a patch is labeled with, `EDGE` if it contains another part of a
            thing, or `NONE`.
        text: ``(6, TEXT_TOKENS)`` int32, see `pack`.
    """

    patches: NDArray[np.uint8]
    held: NDArray[np.bool_]
    labels: NDArray[np.int8]
    shown: NDArray[np.uint8]
    named: NDArray[np.uint8]
    owner: NDArray[np.int8]
    text: NDArray[np.int32]


def sample(scene: Scene) -> Sample:
    """Render and label a scene."""
    pixels = np.asarray(scene.image())
    patches = pixels.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(GRID * GRID, -1)
    rng = Random(f"{scene.split}/{scene.kind}/{scene.seed}/labels")
    held, labels, owner = _labels(scene.things, rng)
    names = shown(scene.things)
    named = np.array([name in names for name in NAMES], dtype=np.uint8)
    text = pack(scene.questions(), scene.things)
    return Sample(np.ascontiguousarray(patches), held, labels, _class_targets(scene.things), named, owner, text)


def pack(questions: Sequence[Question], things: tuple[Thing, ...] = ()) -> NDArray[np.int32]:
    """Write questions and answers one after another.

    Returns:
        ``(6, TEXT_TOKENS)``: token; position after the image; number of the question (`NONE` for padding); next
        token to learn (`NONE` if not learned); id of the task if the answer is next, else `NONE`; and, if a word
        names things, one bit per thing, else `NONE`.
    """
    rows = np.full((6, TEXT_TOKENS), NONE, dtype=np.int32)
    rows[:2] = 0
    begin = 0
    for number, question in enumerate(questions):
        text, answer = token_ids(question.text), token_ids(question.answer)
        if len(answer) != 1:
            raise ValueError(f"{question.answer!r} is not one token")
        tokens = [*text, _assistant_id(), *answer]
        end = begin + len(tokens)
        if end > TEXT_TOKENS:
            continue
        rows[0, begin:end] = tokens
        rows[1, begin:end] = np.arange(len(tokens))
        rows[2, begin:end] = number
        rows[3, end - 2 : end] = answer[0], processing.EOS_ID
        rows[4, end - 2] = TASK_IDS[question.task]
        for word, bits in subjects(question, things).items() if things else ():
            rows[5, begin + word] = bits
        begin = end
    return rows


def subjects(question: Question, things: tuple[Thing, ...]) -> dict[int, int]:
    """Return which words of a question name which things: word number -> one bit per thing (0 if none)."""
    words = question.text.rstrip("?").split()
    last, task = len(words) - 1, question.task

    def bits(matches: Callable[[Thing], bool]) -> int:
        return sum(1 << i for i, thing in enumerate(things) if matches(thing))

    def named(end: int) -> int:
        return bits(lambda thing: thing.name == f"{words[end - 1]} {words[end]}")

    if task == "relation":
        return {3: named(3), last: named(last)}
    if task == "count" and words[3] == "shapes":
        return {3: bits(lambda thing: thing.what in SHAPES and thing.colour == words[2])}
    if task == "count":
        return {2: bits(lambda thing: PLURALS.get(thing.what) == words[2])}
    ends = {"first": 1, "last": len(things) - 1}
    if task == "plate":
        mask = 1 << ends[words[3]] if words[3] in ends else bits(lambda t: t.name == f"{words[3]} glyph")
    elif task == "colour":
        mask = bits(lambda thing: thing.what == words[last])
    else:
        mask = 1 if task.startswith("big") else named(last)
    return {} if task == "which-image" else {last: mask}


@cache
def _tokenizer() -> Any:
    return tokenizer.tokenizer()


@cache
def token_ids(text: str) -> tuple[int, ...]:
    """Return the tokens of a text."""
    return tuple(_tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
def _assistant_id() -> int:
    return token_ids(tokenizer.ASSISTANT)[0]


def _labels(
    things: tuple[Thing, ...], rng: Random
) -> tuple[NDArray[np.bool_], NDArray[np.int8], NDArray[np.int8]]:
    owner = np.full((GRID, GRID), NONE, dtype=np.int8)
    held = np.zeros((GRID, GRID), dtype=bool)
    labels = np.full((GRID, GRID, len(LABELS)), NONE, dtype=np.int8)
    glyphs = [thing for thing in things if thing.what == "glyph"]
    for number, thing in enumerate(things):
        across, down = np.abs(_CENTRES - thing.x), np.abs(_CENTRES - thing.y)
        held |= (down < thing.height / 2 + 3)[:, None] & (across < thing.width / 2 + 3)[None, :]
        reach = [max(_NEAR_PX, _NEAR_SHARE * side) for side in (thing.width, thing.height)]
        near = (down <= reach[1])[:, None] & (across <= reach[0])[None, :]
        owner[near] = number
        if thing.what != "glyph":
            labels[near, 0] = _WHATS.index(thing.what)
        if thing.colour:
            labels[near, 1] = COLOURS.index(thing.colour)
        if thing.digit >= 0:
            labels[near, 2] = thing.digit
        if thing.what == "glyph":
            labels[near, 3] = 0 if thing is glyphs[0] else 2 if thing is glyphs[-1] else 1
    for number, thing in enumerate(things):
        mine = owner == number
        if thing.what != "glyph":
            labels[mine, 4] = 0 if thing.what == "plate" else _shares(thing, mine)
    for patch in rng.sample(range(GRID * GRID), int(_BACKGROUND_SHARE * GRID * GRID)):
        if not held.flat[patch]:
            labels[patch // GRID, patch % GRID, 4] = 0
    owner[held & (owner == NONE)] = EDGE
    return held.ravel(), labels.reshape(-1, len(LABELS)), owner.ravel()


def _shares(thing: Thing, mine: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Divide a thing among its patches, in percent: smoothly, as neighbors may be equally close to its center."""
    near = np.outer(
        np.maximum(0, 1 - np.abs(_CENTRES - thing.y) / PATCH),
        np.maximum(0, 1 - np.abs(_CENTRES - thing.x) / PATCH),
    )[mine]
    shares: NDArray[np.int8] = np.round(100 * near / max(near.sum(), 1e-6)).astype(np.int8)
    return shares


def _class_targets(things: tuple[Thing, ...]) -> NDArray[np.uint8]:
    targets = np.zeros(len(SHAPES) * len(COLOURS) + 10, dtype=np.uint8)
    for thing in things:
        if thing.what in SHAPES:
            targets[SHAPES.index(thing.what) * len(COLOURS) + COLOURS.index(thing.colour)] = 1
        if thing.digit >= 0:
            targets[len(SHAPES) * len(COLOURS) + thing.digit] = 1
    return targets
