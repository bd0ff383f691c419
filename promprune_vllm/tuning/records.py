"""The file of answers to an operator's questions: written line by line, read back after an interruption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from promprune_vllm.evaluation.records import Lines, of_answers, read_lines

Key = tuple[str, str, str]
"""Question, method, budget."""


@dataclass(frozen=True, slots=True)
class Said:
    """One answer.

    Args:
        question: Id of the question.
        method: Method that selected the tokens; ``full`` if all were kept.
        budget: Budget of the request, in JSON.
        text: The model's answer.
        seen: Visual tokens of the images.
        kept: Visual tokens that entered the language model, as counted by the server.
        prompt_tokens: Tokens of the prompt.
        tokens: Tokens of the answer, without the one that ends it.
        confidence: The smallest probability of a likeliest token among its first tokens.
        seconds: Time from the request to the reply.
        cut_off: Whether it reached the longest answer that was asked for.
    """

    question: str
    method: str
    budget: str
    text: str
    seen: int
    kept: int
    prompt_tokens: int
    tokens: int
    confidence: float
    seconds: float
    cut_off: bool = False

    @property
    def key(self) -> Key:
        """Identifies the question, the method and the budget."""
        return (self.question, self.method, self.budget)

    def same_as(self, other: Said) -> bool:
        """Return whether both answers have the same text, but for spaces around it."""
        return self.text.strip() == other.text.strip()


@dataclass(frozen=True, slots=True)
class Audit:
    """What all tokens say about an answer that was given with fewer.

    Args:
        question: Id of the question.
        method: Method of the answer.
        budget: Budget of the answer.
        tokens: Tokens of the answer that were found in the prompt; 0 if the chat template does not show them.
        first: How many of them are the likeliest with all tokens.
        nats: Sum over them of the log-probability of the likeliest token minus that of the answer's.
    """

    question: str
    method: str
    budget: str
    tokens: int
    first: int
    nats: float

    @property
    def key(self) -> Key:
        """Identifies the answer."""
        return (self.question, self.method, self.budget)


@dataclass(frozen=True, slots=True)
class Records:
    """Contents of a file of answers.

    Args:
        settings: Everything that influences the answers.
        run: Provenance of the last session, with what it knew of the server.
        notes: What that session could not do.
        said: Answers.
        audits: Audits of those that differ from the one with all tokens.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    said: Mapping[Key, Said] = field(default_factory=dict)
    audits: Mapping[Key, Audit] = field(default_factory=dict)


class Log(Lines):
    """An open file of answers; see ``Lines``."""

    def __init__(self, file: Path, settings: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        self.said: dict[Key, Said] = {}
        self.audits: dict[Key, Audit] = {}
        super().__init__(file, settings, run)

    def load(self, lines: Sequence[dict[str, Any]]) -> None:
        """Take over the answers and audits of earlier sessions."""
        self.said, self.audits = _answers(lines)

    def add(self, answer: Said | Audit) -> None:
        """Write one answer or audit."""
        if isinstance(answer, Said):
            self.said[answer.key] = answer
            self.write({"said": asdict(answer)})
        else:
            self.audits[answer.key] = answer
            self.write({"audit": asdict(answer)})

    def note(self, text: str) -> None:
        """Write what this session could not do."""
        self.write({"note": text})


def read(file: Path) -> Records:
    """Read a file of answers; an incomplete last line is ignored.

    Raises:
        EvaluationError: There is no such file, or it is not a file of answers.
    """
    settings, lines, _ = read_lines(file)
    with of_answers(file):
        start = max(place for place, line in enumerate(lines) if "run" in line)
        notes = tuple(line["note"] for line in lines[start:] if "note" in line)
        return Records(settings, lines[start]["run"], notes, *_answers(lines))


def _answers(lines: Sequence[dict[str, Any]]) -> tuple[dict[Key, Said], dict[Key, Audit]]:
    said = [Said(**line["said"]) for line in lines if "said" in line]
    audits = [Audit(**line["audit"]) for line in lines if "audit" in line]
    if any(not line.keys() & {"said", "audit", "run", "note"} for line in lines):
        raise ValueError("it has lines of another command")
    return {each.key: each for each in said}, {each.key: each for each in audits}
