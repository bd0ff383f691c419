"""The questions: scenes from held-out seeds, redrawn from their seeds each time."""

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
        name: Name of the task in scenes.
        kind: Kind of scene that it is asked about.
        weight: Weight in the macro accuracy. Each task about scattered objects counts as much as all tasks about a
            single object together.
        asks: What it asks, in a few words.
        most: Maximum number of its questions, if lower than for other tasks.
    """

    name: str
    kind: str
    weight: float
    asks: str
    most: int | None = None

    def of(self, questions: int) -> int:
        """Return how many of its questions to ask, given the number per task."""
        return questions if self.most is None else min(self.most, questions)


TASKS = (
    Task("presence", "scattered", 1 / 7, "whether an object is there"),
    Task("count", "scattered", 1 / 7, "how many of a kind"),
    Task("colour", "scattered", 1 / 7, "the colour of the only one of its shape"),
    Task("digit", "scattered", 1 / 7, "the digit on a card"),
    Task("where", "scattered", 1 / 7, "the quarter of the image an object is in"),
    Task("relation", "scattered", 1 / 7, "how two objects are positioned relative to each other"),
    Task("big-shape", "concentrated", 1 / 21, "the shape of a single object"),
    Task("big-colour", "concentrated", 1 / 21, "its colour"),
    Task("plate", "concentrated", 1 / 21, "what is written on a plate"),
)
WEIGHTS = {task.name: task.weight for task in TASKS}
KINDS = tuple(dict.fromkeys(task.kind for task in TASKS))


class SceneQuestion(Protocol):
    """A question about a scene."""

    @property
    def task(self) -> str:
        """Name of its task."""

    @property
    def text(self) -> str:
        """Text of the question."""

    @property
    def answer(self) -> str:
        """The right answer."""


class Scene(Protocol):
    """A scene, as the demo's generator draws it."""

    def image(self) -> Image:
        """Return the picture."""

    def questions(self) -> Sequence[SceneQuestion]:
        """Return all questions about it, always in the same order."""


Draw = Callable[[str, int, str], Scene]
"""Draws the scene of a kind, a seed and a split."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question about one picture.

    Args:
        task: Name of its task.
        index: Index among the questions of its scene.
        rank: Number of questions of the same task before it.
        text: Text of the question.
        answer: The right answer.
    """

    task: str
    index: int
    rank: int
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A scene and the questions about it."""

    kind: str
    seed: int
    items: tuple[Item, ...]


def tasks_by_name(names: Sequence[str]) -> tuple[Task, ...]:
    """Return tasks by name, in the order of ``TASKS``; the name of a kind of scene stands for all of its tasks.

    Args:
        names: Each optionally with ``:N``, the maximum number of its questions; empty for all tasks.

    Raises:
        EvaluationError: A task is unknown, or N is not a number.
    """
    task_by_name: dict[str, Task] = {}
    for each in names or KINDS:
        name, most = split_limit(each)
        named = [task for task in TASKS if name in (task.name, task.kind)]
        if not named:
            raise EvaluationError(
                f"There is no task {name!r}. Choose from {', '.join(task.name for task in TASKS)}, "
                f"or {' or '.join(KINDS)} for all tasks of that kind."
            )
        task_by_name |= {task.name: replace(task, most=most) for task in named}
    return tuple(task_by_name[task.name] for task in TASKS if task.name in task_by_name)


def split_limit(text: str) -> tuple[str, int | None]:
    """Split ``name:N`` into the name and the maximum number of questions; ``None`` for a name alone.

    Raises:
        EvaluationError: N is not a number above 0.
    """
    name, colon, most = text.partition(":")
    if colon and not (most.isdecimal() and int(most)):
        raise EvaluationError(f"{text!r} has no valid number of questions: write {name}:100, or {name} alone.")
    return name, int(most) if colon else None


def gather(tasks: Sequence[Task], questions: int, draw: Draw | None = None) -> tuple[Picture, ...]:
    """Collect the questions of every task from scenes of each kind, starting at seed 0.

    A shorter run asks the first questions of a longer one, so that the two are paired. Kinds alternate, so that an
    interrupted run has some of every kind.

    Args:
        tasks: At least one task.
        questions: Number of questions per task, unless a task has a smaller maximum.
        draw: Draws a scene; the demo's generator by default.
    """
    draw = draw or scenes()
    pictures: list[Picture] = []
    for kind in dict.fromkeys(task.kind for task in tasks):
        number_by_task = {task.name: task.of(questions) for task in tasks if task.kind == kind}
        missing = dict(number_by_task)
        seed = 0
        while any(missing.values()):
            items = []
            for index, question in enumerate(draw(kind, seed, SPLIT).questions()):
                if missing.get(question.task):
                    rank = number_by_task[question.task] - missing[question.task]
                    missing[question.task] -= 1
                    items.append(Item(question.task, index, rank, question.text, question.answer))
            if items:
                pictures.append(Picture(kind, seed, tuple(items)))
            seed += 1
            if seed > 100 * questions + 100:
                names = ", ".join(name for name, left in missing.items() if left)
                raise EvaluationError(
                    f"None of {seed} {kind} scenes asks about {names}: the scene generator is broken."
                )
    return tuple(sorted(pictures, key=lambda picture: min(item.rank for item in picture.items)))


def fingerprint(draw: Draw | None = None, seeds: int = 2) -> str:
    """Return a hash of what the generator draws and asks, to detect answers about other scenes."""
    draw = draw or scenes()
    digest = hashlib.sha256()
    for kind in KINDS:
        for seed in range(seeds):
            scene = draw(kind, seed, SPLIT)
            digest.update(scene.image().tobytes())
            digest.update(repr([(q.task, q.text, q.answer) for q in scene.questions()]).encode())
    return digest.hexdigest()[:16]


def scenes() -> Draw:
    """Return the demo's scene generator."""
    from promprune_vllm.demo.scenes import make_scene

    return make_scene
