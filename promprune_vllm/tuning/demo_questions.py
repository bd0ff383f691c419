"""Questions about the demo's scenes in the form of an operator's own, to try ``promprune tune`` with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from promprune_vllm.demo.scenes import make_scene
from promprune_vllm.demo.scenes.record import CONCENTRATED_TASKS, SCATTERED_TASKS
from promprune_vllm.demo.scenes.scene import Scene
from promprune_vllm.errors import EvaluationError

FILE = "questions.jsonl"


def write(folder: Path, number: int, first_seed: int = 0) -> Path:
    """Write questions, one per scene, with their pictures; return the file.

    Tasks take turns with the weights of ``promprune eval``: each about scattered objects as often as all about a
    single object together. The scenes are held-out ones: no model was trained on them.

    Args:
        folder: Folder to write to; created if missing.
        number: Number of questions.
        first_seed: Seed of the first scene of each kind; for other questions, take one that is far away.

    Raises:
        EvaluationError: The folder has such a file already, or cannot be written.
    """
    file = folder / FILE
    if file.exists():
        raise EvaluationError(f"{file} is there already: choose another folder with --out, or remove it.")
    scenes = {kind: _scenes(kind, first_seed) for kind in ("scattered", "concentrated")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as lines:
            for place in range(number):
                turn = place % (len(SCATTERED_TASKS) + 1)
                tasks = SCATTERED_TASKS[turn : turn + 1] or CONCENTRATED_TASKS
                kind = "scattered" if turn < len(SCATTERED_TASKS) else "concentrated"
                lines.write(json.dumps(_line(scenes[kind], tasks, folder, place)) + "\n")
    except OSError as error:
        raise EvaluationError(
            f"{folder} cannot be written ({error}): choose another folder with --out."
        ) from error
    return file


def _scenes(kind: str, seed: int) -> Iterator[Scene]:
    while True:
        yield make_scene(kind, seed)
        seed += 1


def _line(scenes: Iterator[Scene], tasks: tuple[str, ...], folder: Path, place: int) -> dict[str, str]:
    """Draw the next scene that has a question of one of these tasks."""
    for scene in scenes:
        question = next((each for each in scene.questions() if each.task in tasks), None)
        if question is not None:
            name = f"{place:04}-{question.task}"
            scene.image().save(folder / f"{name}.png")
            return {"id": name, "image": f"{name}.png", "question": question.text, "answer": question.answer}
    raise AssertionError("scenes do not end")
