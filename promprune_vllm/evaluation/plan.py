"""Parses the options of ``promprune eval`` into a plan of questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from promprune_vllm.core.budget import AUTO, FULL, Budget
from promprune_vllm.errors import BudgetError, EvaluationError
from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.sender import Way
from promprune_vllm.evaluation.tasks import Task, split_limit, tasks_by_name

REST = "*"
"""Instead of a method's name: all other methods that the server allows for images."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The questions to ask.

    Args:
        ways: Methods with budgets, ``full`` first.
        tasks: Tasks to ask questions of.
        concurrency: Requests in flight.
        temperature: Sampling temperature.
    """

    ways: tuple[Way, ...]
    tasks: tuple[Task, ...]
    concurrency: int
    temperature: float = 0

    @property
    def questions(self) -> int:
        """The largest number of questions per task that any way asks."""
        return max(way.questions for way in self.ways)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that select tokens."""
        return tuple(dict.fromkeys(way.method for way in self.ways if way.method != FULL_METHOD))


@dataclass(frozen=True, slots=True)
class Options:
    """The options, checked as far as possible without a server.

    Args:
        tasks: At least one task.
        budgets: At least one budget.
        methods: Methods with their number of questions; empty for all that the server allows.
        questions: Number of questions of methods that set none.
        concurrency: Requests in flight.
        temperature: Sampling temperature.
    """

    tasks: tuple[Task, ...]
    budgets: tuple[int | float | str, ...]
    methods: tuple[tuple[str, int], ...]
    questions: int
    concurrency: int
    temperature: float = 0

    def plan(self, allowed: Sequence[str]) -> Plan:
        """Return the plan for a server.

        Args:
            allowed: Methods that the server allows for images.
        """
        methods = dict(self.methods or ((REST, self.questions),))
        if (rest := methods.pop(REST, None)) is not None:
            methods |= {name: rest for name in allowed if name not in methods}
        most = max(methods.values())
        pruned = (Way(name, budget, n) for name, n in methods.items() for budget in self.budgets)
        return Plan((Way.full(most), *pruned), self.tasks, self.concurrency, self.temperature)


def parse_options(
    tasks: str, budgets: str, methods: str, *, questions: int, concurrency: int, check: Callable[[str], object]
) -> Options:
    """Parse the options.

    Args:
        tasks: Comma-separated names; empty for all.
        budgets: Comma-separated tokens or shares.
        methods: Comma-separated names, each optionally with ``:N``; ``*`` for all others.
        questions: Number of questions of methods without ``:N``.
        concurrency: Requests in flight.
        check: Raises an error for an unknown method.

    Raises:
        EvaluationError: A task is unknown, or a budget or a number of questions is invalid.
    """
    named = tuple((name, most or questions) for name, most in map(split_limit, split_list(methods)))
    for name, _ in named:
        if name != REST:
            check(name)
    return Options(tasks_by_name(split_list(tasks)), parse_budgets(budgets), named, questions, concurrency)


def parse_budgets(text: str) -> tuple[int | float | str, ...]:
    """Parse comma-separated tokens or shares.

    Raises:
        EvaluationError: One is invalid, or keeps all tokens.
    """
    return tuple(map(_budget, split_list(text)))


def split_list(text: str) -> list[str]:
    """Split a comma-separated option."""
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
            raise EvaluationError(f"--budgets has an invalid entry {text!r}: {error}") from error
        value = text
    if value in (AUTO, FULL):
        raise EvaluationError(
            f"--budgets cannot have {text!r}: give tokens or shares (all tokens are always measured too)."
        )
    return value
