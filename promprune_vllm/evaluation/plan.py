"""What the options of ``promprune eval`` ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from promprune_vllm.core.budget import AUTO, FULL, Budget
from promprune_vllm.errors import BudgetError, EvaluationError
from promprune_vllm.evaluation.asking import Way
from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.tasks import Task, chosen, limited

REST = "*"
"""In a method's place: every other one that the server allows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked.

    Args:
        ways: Methods with budgets, every token first.
        tasks: Of which questions are asked.
        concurrency: Requests in flight.
    """

    ways: tuple[Way, ...]
    tasks: tuple[Task, ...]
    concurrency: int

    @property
    def questions(self) -> int:
        """The most that any way asks of a task."""
        return max(way.questions for way in self.ways)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that choose tokens."""
        return tuple(dict.fromkeys(way.method for way in self.ways if way.method != FULL_METHOD))


@dataclass(frozen=True, slots=True)
class Wanted:
    """The options, checked as far as they can be without a server.

    Args:
        tasks: At least one.
        budgets: At least one.
        methods: With the number of questions of each; none for all that the server allows.
        questions: Of a method that names no number.
        concurrency: Requests in flight.
    """

    tasks: tuple[Task, ...]
    budgets: tuple[int | float | str, ...]
    methods: tuple[tuple[str, int], ...]
    questions: int
    concurrency: int

    def plan(self, allowed: Sequence[str]) -> Plan:
        """Return every way to ask.

        Args:
            allowed: The methods of the server.
        """
        methods = dict(self.methods or ((REST, self.questions),))
        if (rest := methods.pop(REST, None)) is not None:
            methods |= {name: rest for name in allowed if name not in methods}
        most = max(methods.values())
        pruned = (Way(name, budget, n) for name, n in methods.items() for budget in self.budgets)
        return Plan((Way.full(most), *pruned), self.tasks, self.concurrency)


def wanted(
    tasks: str, budgets: str, methods: str, *, questions: int, concurrency: int, check: Callable[[str], object]
) -> Wanted:
    """Read the options.

    Args:
        tasks: Names with commas between; empty for all.
        budgets: Tokens or shares with commas between.
        methods: Names with commas between, each with ``:N`` after it or not; ``*`` for all others.
        questions: Of a method that names no number.
        concurrency: Requests in flight.
        check: Refuses the name of a method.

    Raises:
        EvaluationError: An unknown task, or a budget or number of questions that is none.
    """
    named = tuple((name, most or questions) for name, most in map(limited, listed(methods)))
    for name, _ in named:
        if name != REST:
            check(name)
    return Wanted(chosen(listed(tasks)), tuple(map(_budget, listed(budgets))), named, questions, concurrency)


def listed(text: str) -> list[str]:
    """Return the parts of an option that takes several, with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _budget(text: str) -> int | float | str:
    value: int | float | str = text
    try:
        value = json.loads(text)
        Budget.parse(value)
    except ValueError as error:
        try:
            Budget.parse(text)
        except BudgetError:
            raise EvaluationError(f"--budgets cannot have {text!r}: {error}") from error
        value = text
    if value in (AUTO, FULL):
        raise EvaluationError(
            f"--budgets cannot have {text!r}: every token is asked anyway; give tokens or shares."
        )
    return value
