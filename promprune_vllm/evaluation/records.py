"""The file of answers: written line by line, read back after an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from promprune_vllm.errors import EvaluationError

FULL_METHOD = "full"
"""Used instead of a method's name if every token is kept."""
FILE = "answers.jsonl"
_FORMAT = 1
Key = tuple[str, int, int, str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Args:
        kind: Kind of the scene.
        seed: Seed of the scene.
        index: Index of the question among the scene's.
        task: Task of the question.
        method: Method that selected the tokens; ``full`` if all were kept.
        budget: Budget of the request, in JSON.
        question: Question text.
        expected: The right answer.
        said: The model's answer.
        correct: Whether it is right.
        seen: Visual tokens of the image.
        kept: Visual tokens that entered the language model, as counted by the server.
        seconds: Time from the request to the reply.
        confidence: How sure the model was: the smallest probability of a likeliest token among the first tokens.
            ``None`` in older files.
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
    confidence: float | None = None

    @property
    def key(self) -> Key:
        """Identifies the question, the method and the budget."""
        return (self.kind, self.seed, self.index, self.method, self.budget)

    @property
    def asked(self) -> tuple[str, int, int]:
        """Identifies the question."""
        return (self.kind, self.seed, self.index)

    @property
    def image(self) -> tuple[str, int]:
        """Identifies the scene."""
        return (self.kind, self.seed)


def is_right(said: str, expected: str) -> bool:
    """Return whether an answer is the expected one, ignoring case, surrounding spaces and a final period."""
    return said.strip().removesuffix(".").strip().lower() == expected.strip().lower()


@dataclass(frozen=True, slots=True)
class Records:
    """Contents of a file of answers.

    Args:
        settings: Everything that influences the answers.
        runs: Provenance of each session.
        answers: Answers by key.
    """

    settings: Mapping[str, Any]
    runs: tuple[Mapping[str, Any], ...]
    answers: Mapping[Key, Answer]


def read(file: Path) -> Records:
    """Read a file of answers; an incomplete last line is ignored.

    Raises:
        EvaluationError: There is no such file, or it is not a file of answers.
    """
    settings, lines, _ = read_lines(file)
    with of_answers(file):
        return Records(settings, tuple(line["run"] for line in lines if "run" in line), _answers(lines))


class Lines:
    """An open file of JSON lines: settings, the provenance of each session, and what is added. Continues a file.

    Args:
        file: Path of the file; created if missing.
        settings: Everything that influences the answers.
        run: Provenance of this session.

    Raises:
        EvaluationError: The file has other settings, or is not a file of answers.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))  # as it will be read back
        if file.is_file() and file.stat().st_size:
            was, lines, whole = read_lines(file)
            _require_same(file, was, settings)
            with of_answers(file):
                self.load(lines)
            with file.open("r+b") as cut:
                cut.truncate(whole)
        self._output = file.open("a", encoding="utf-8")
        if not self._output.tell():
            self.write({"format": _FORMAT, "settings": settings})
        self.write({"run": run})

    def load(self, lines: Sequence[dict[str, Any]]) -> None:
        """Take over what an earlier session has written after the settings."""
        raise NotImplementedError

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line and flush it to the operating system."""
        self._output.write(json.dumps(line) + "\n")
        self._output.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.close()


class Log(Lines):
    """An open file of answers; see ``Lines``."""

    def __init__(self, file: Path, settings: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        self.answers: dict[Key, Answer] = {}
        super().__init__(file, settings, run)

    def load(self, lines: Sequence[dict[str, Any]]) -> None:
        """Take over the answers of earlier sessions."""
        self.answers.update(_answers(lines))

    def add(self, answer: Answer) -> None:
        """Write one answer."""
        self.answers[answer.key] = answer
        self.write(asdict(answer))


def read_lines(file: Path) -> tuple[Mapping[str, Any], list[dict[str, Any]], int]:
    """Return the settings of a file, its other complete lines, and the number of bytes in all complete lines.

    Raises:
        EvaluationError: There is no such file, or it is not a file of answers.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise EvaluationError(
            f"{file} cannot be read ({error.strerror}): set --out to the folder of a run."
        ) from error
    whole = content.rfind(b"\n") + 1
    with of_answers(file):
        head, *lines = [json.loads(line) for line in content[:whole].splitlines()]
        if head["format"] != _FORMAT:
            raise ValueError(f"format {head['format']}")
        return head["settings"], lines, whole


@contextmanager
def of_answers(file: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a file's lines into an error about the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{file} is not a file of answers ({error}). Choose another folder with --out, or remove the file."
        ) from error


def _answers(lines: Sequence[dict[str, Any]]) -> dict[Key, Answer]:
    return {answer.key: answer for answer in (Answer(**line) for line in lines if "run" not in line)}


def _require_same(file: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {was.get(name)!r}, is now {now.get(name)!r}" for name in differing)
        raise EvaluationError(
            f"{file} has answers with other settings: {changes}. "
            "Choose another folder with --out, or remove the file."
        )
