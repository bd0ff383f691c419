"""Answers as lines of a file: written one by one, read back after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from promprune_vllm.errors import EvaluationError

FULL_METHOD = "full"
"""What stands in a method's place where every token is kept."""
FILE = "answers.jsonl"
_FORMAT = 1
Key = tuple[str, int, int, str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Args:
        kind: Of the scene asked about.
        seed: That it was drawn from.
        index: Of the question among the scene's.
        task: The question's.
        method: That chose the tokens; ``full`` where all were kept.
        budget: As it was asked for, in JSON.
        question: What was asked.
        expected: The right answer.
        said: What the model said.
        correct: Whether that is the right answer.
        seen: Visual tokens of the image.
        kept: Those that entered the language model, as the server counts them.
        seconds: From sending the request to its reply.
    """

    kind: str
    seed: int
    index: int
    task: str
    method: str
    budget: str
    question: str
    expected: str
    said: str
    correct: bool
    seen: int
    kept: int
    seconds: float

    @property
    def key(self) -> Key:
        """What it answers."""
        return (self.kind, self.seed, self.index, self.method, self.budget)

    @property
    def image(self) -> tuple[str, int]:
        """What it is about."""
        return (self.kind, self.seed)


def right(said: str, expected: str) -> bool:
    """Whether an answer is the expected one: letter case, spaces around it and a full stop do not count."""
    return said.strip().removesuffix(".").strip().lower() == expected.strip().lower()


@dataclass(frozen=True, slots=True)
class Records:
    """What a file of answers holds.

    Args:
        settings: Everything that decides what a question is answered with.
        runs: Where, when and how each session asked.
        answers: By key.
    """

    settings: Mapping[str, Any]
    runs: tuple[Mapping[str, Any], ...]
    answers: Mapping[Key, Answer]


def read(file: Path) -> Records:
    """Read a file of answers; a last line that was cut off in writing is left out.

    Raises:
        EvaluationError: There is no such file, or it is none of ours.
    """
    records, _ = _read(file)
    return records


class Log:
    """A file of answers that grows. Opening one that is there goes on with it.

    Args:
        file: Made where there is none.
        settings: Everything that decides what a question is answered with.
        run: Where, when and how this session asks.

    Raises:
        EvaluationError: The file was made with other settings, or is none of ours.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.answers: dict[Key, Answer] = {}
        settings = json.loads(json.dumps(settings))  # as it will be read back
        if file.is_file() and file.stat().st_size:
            records, whole = _read(file)
            _require_same(file, records.settings, settings)
            self.answers.update(records.answers)
            with file.open("r+b") as cut:
                cut.truncate(whole)
        self._output = file.open("a", encoding="utf-8")
        if not self._output.tell():
            self._write({"format": _FORMAT, "settings": settings})
        self._write({"run": run})

    def add(self, answer: Answer) -> None:
        """Write one answer; it is in the operating system's hands when this returns."""
        self.answers[answer.key] = answer
        self._write(asdict(answer))

    def _write(self, line: Mapping[str, Any]) -> None:
        self._output.write(json.dumps(line) + "\n")
        self._output.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.close()


def _read(file: Path) -> tuple[Records, int]:
    """Return what a file holds, and how many of its bytes are whole lines."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise EvaluationError(
            f"{file} cannot be read ({error.strerror}): name the folder of a run with --out."
        ) from error
    whole = content.rfind(b"\n") + 1
    try:
        head, *lines = [json.loads(line) for line in content[:whole].splitlines()]
        if head["format"] != _FORMAT:
            raise ValueError(f"format {head['format']}")
        runs = tuple(line["run"] for line in lines if "run" in line)
        answers = {answer.key: answer for answer in (Answer(**line) for line in lines if "run" not in line)}
        return Records(head["settings"], runs, answers), whole
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{file} is no file of answers ({error}). Name another folder with --out, or remove the file."
        ) from error


def _require_same(file: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in differing)
        raise EvaluationError(
            f"{file} has answers under other settings: {changes}. "
            "Name another folder with --out, or remove the file."
        )
