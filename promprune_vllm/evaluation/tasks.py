"""The questions: scenes from held-out seeds, drawn anew each time from those seeds alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from PIL.Image import Image

from promprune_vllm.errors import EvaluationError

SPLIT = "held-out"


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of question.

    Args:
        name: As scenes call it.
        kind: Of the scenes it is asked about.
        weight: In the macro accuracy: every task about scattered objects counts as much as those about a single
            object together.
        asks: What for, in a few words.
        most: Questions of it, where fewer are wanted than of others.
    """

    name: str
    kind: str
    weight: float
    asks: str
    most: int | None = None

    def of(self, questions: int) -> int:
        """Return how many of its questions are wanted where so many are of each task."""
        return questions if self.most is None else min(self.most, questions)


TASKS = (
    Task("presence", "scattered", 1 / 7, "whether an object is there"),
    Task("count", "scattered", 1 / 7, "how many of a kind"),
    Task("colour", "scattered", 1 / 7, "the colour of the only one of its shape"),
    Task("digit", "scattered", 1 / 7, "the digit on a card"),
    Task("where", "scattered", 1 / 7, "the quarter of the image an object is in"),
    Task("relation", "scattered", 1 / 7, "how two objects lie to each other"),
    Task("big-shape", "concentrated", 1 / 21, "the shape of a single object"),
    Task("big-colour", "concentrated", 1 / 21, "its colour"),
    Task("plate", "concentrated", 1 / 21, "what is written on a plate"),
)
WEIGHTS = {task.name: task.weight for task in TASKS}
KINDS = tuple(dict.fromkeys(task.kind for task in TASKS))


class Asked(Protocol):
    """A question of a scene."""

    @property
    def task(self) -> str:
        """Its task's name."""

    @property
    def text(self) -> str:
        """What is asked."""

    @property
    def answer(self) -> str:
        """The right answer."""


class Drawn(Protocol):
    """A scene."""

    def image(self) -> Image:
        """Return its pixels."""

    def questions(self) -> Sequence[Asked]:
        """Return what can be asked about it, always in the same order."""


Draw = Callable[[str, int, str], Drawn]
"""Make a scene of a kind from a seed, of a split."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question about one picture.

    Args:
        task: Its task's name.
        index: Its place among the questions of its scene.
        rank: How many of its task come before it.
        text: What is asked.
        answer: The right answer.
    """

    task: str
    index: int
    rank: int
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A scene and what is asked about it."""

    kind: str
    seed: int
    items: tuple[Item, ...]


def chosen(names: Sequence[str]) -> tuple[Task, ...]:
    """Return tasks by name, in the order of ``TASKS``; a kind of scene names all of its tasks.

    Args:
        names: Each with ``:N`` after it where N questions are the most that are wanted; none for all tasks.

    Raises:
        EvaluationError: There is no such task, or N is no number.
    """
    found: dict[str, Task] = {}
    for each in names or KINDS:
        name, most = limited(each)
        named = [task for task in TASKS if name in (task.name, task.kind)]
        if not named:
            raise EvaluationError(
                f"There is no task {name!r}. Give some of {', '.join(task.name for task in TASKS)}, "
                f"or {' or '.join(KINDS)} for all of that kind."
            )
        found |= {task.name: replace(task, most=most) for task in named}
    return tuple(found[task.name] for task in TASKS if task.name in found)


def limited(text: str) -> tuple[str, int | None]:
    """Split ``name:N`` into the name and the most questions that are wanted; ``None`` for a name alone.

    Raises:
        EvaluationError: N is no number above 0.
    """
    name, colon, most = text.partition(":")
    if colon and not (most.isdecimal() and int(most)):
        raise EvaluationError(f"{text!r} asks no number of questions: write it as {name}:100, or {name} alone.")
    return name, int(most) if colon else None


def gather(tasks: Sequence[Task], questions: int, draw: Draw | None = None) -> tuple[Picture, ...]:
    """Go through the seeds of each kind from 0 until every task has its questions.

    The questions of a shorter run are the first of a longer one's, so that the two are paired. Kinds take turns,
    so that a run cut short has some of everything.

    Args:
        tasks: At least one.
        questions: Of each task that sets no smaller limit.
        draw: Makes a scene; that of the demo by default.
    """
    draw = draw or scenes()
    pictures: list[Picture] = []
    for kind in dict.fromkeys(task.kind for task in tasks):
        wanted = {task.name: task.of(questions) for task in tasks if task.kind == kind}
        missing = dict(wanted)
        seed = 0
        while any(missing.values()):
            items = []
            for index, asked in enumerate(draw(kind, seed, SPLIT).questions()):
                if missing.get(asked.task):
                    rank = wanted[asked.task] - missing[asked.task]
                    missing[asked.task] -= 1
                    items.append(Item(asked.task, index, rank, asked.text, asked.answer))
            if items:
                pictures.append(Picture(kind, seed, tuple(items)))
            seed += 1
            if seed > 100 * questions + 100:
                names = ", ".join(name for name, left in missing.items() if left)
                raise EvaluationError(
                    f"No {kind} scene of {seed} seeds asks about {names}: its generator is broken."
                )
    return tuple(sorted(pictures, key=lambda picture: min(item.rank for item in picture.items)))


def fingerprint(draw: Draw | None = None, seeds: int = 2) -> str:
    """Identify what the generator draws and asks, so that answers to other scenes are not taken for these."""
    draw = draw or scenes()
    digest = hashlib.sha256()
    for kind in KINDS:
        for seed in range(seeds):
            scene = draw(kind, seed, SPLIT)
            digest.update(scene.image().tobytes())
            digest.update(repr([(q.task, q.text, q.answer) for q in scene.questions()]).encode())
    return digest.hexdigest()[:16]


def scenes() -> Draw:
    """Return the demo's generator of scenes."""
    from promprune_vllm.demo.scenes import make_scene

    return make_scene
