"""What a file of answers says: accuracies by method, budget and task, and each method against its rivals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from promprune_vllm.evaluation.records import FULL_METHOD, Answer, Key, Records
from promprune_vllm.evaluation.statistics import Comparison, Estimate, Sums, by_task, compare
from promprune_vllm.evaluation.tasks import TASKS, WEIGHTS

FIXED_SPLITS = ("split-0", "split-25", "split-50", "split-75", "fastervlm")
"""PromPrune with a fixed salient share; ``fastervlm`` is the share of 1."""
CONTROLS = ("random", "uniform")
SUBJECT = "promprune"
BEST_SPLIT, ALL_TOKENS = "best fixed split", "all tokens"


@dataclass(frozen=True, slots=True)
class Cell:
    """One method with one budget.

    Args:
        method: ``full`` where every token was kept.
        budget: As asked for.
        kept: Tokens kept of an image, on average.
        macro: Over all tasks asked.
        tasks: Each by itself.
    """

    method: str
    budget: str
    kept: float
    macro: Estimate
    tasks: dict[str, Estimate]

    def estimate(self, task: str | None) -> Estimate | None:
        """Return that of a task, if it was asked; without one, the macro accuracy."""
        return self.macro if task is None else self.tasks.get(task)


@dataclass(frozen=True, slots=True)
class Pair:
    """One method against another way of keeping tokens, at one budget.

    Args:
        method: The first.
        budget: Of both, but where the second keeps all tokens.
        against: What the second is to it: a control's name, ``best fixed split`` or ``all tokens``.
        other: The second's method.
        comparison: On the questions both were asked.
    """

    method: str
    budget: str
    against: str
    other: str
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class Report:
    """Everything, ready to be shown.

    Args:
        cells: Those of ``full`` first, then by budget from the largest, and by method.
        pairs: Every method against the controls, the best fixed split and all tokens.
        records: What it was made of.
    """

    cells: tuple[Cell, ...]
    pairs: tuple[Pair, ...]
    records: Records = field(repr=False)

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets of pruned cells, from the largest."""
        return tuple(dict.fromkeys(cell.budget for cell in self.cells if cell.method != FULL_METHOD))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of pruned cells: PromPrune, the published ones, fixed splits, controls."""
        return tuple(sorted({c.method for c in self.cells if c.method != FULL_METHOD}, key=_place))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that were asked."""
        asked = {name for cell in self.cells for name in cell.tasks}
        return tuple(task.name for task in TASKS if task.name in asked)

    def cell(self, method: str, budget: str | None = None) -> Cell | None:
        """Return the figures of a method, where it was asked."""
        found = (c for c in self.cells if c.method == method and budget in (None, c.budget))
        return next(found, None)

    def against(self, method: str) -> list[Pair]:
        """Return the comparisons of one method."""
        return [pair for pair in self.pairs if pair.method == method]

    def level(self, method: str, budget: str, task: str | None = None) -> Estimate | None:
        """Return an accuracy that may be set beside those of methods which were asked other questions.

        That of all tokens, on everything they were asked, plus the paired difference from them; its error is the
        difference's. Where all tokens were not asked, the plain accuracy.

        Args:
            method: Of a pruned cell.
            budget: As asked for.
            task: One task; without one, the macro accuracy.
        """
        cell, full = self.cell(method, budget), self.cell(FULL_METHOD)
        if cell is None or cell.estimate(task) is None:
            return None
        pairs = (p for p in self.against(method) if p.budget == budget and p.against == ALL_TOKENS)
        compared = pair.comparison if (pair := next(pairs, None)) else None
        if compared is None or full is None or (task is not None and task not in compared.tasks):
            return cell.estimate(task)
        difference = compared.difference if task is None else compared.tasks[task]
        weights = {name: WEIGHTS[name] for name in ([task] if task else compared.tasks)}
        base = sum(weight * full.tasks[name].value for name, weight in weights.items()) / sum(weights.values())
        return replace(difference, value=base + difference.value)

    def as_document(self) -> dict[str, Any]:
        """Everything but the answers, ready for JSON."""
        return {
            "settings": dict(self.records.settings),
            "runs": [dict(run) for run in self.records.runs],
            "cells": [asdict(cell) for cell in self.cells],
            "pairs": [asdict(pair) for pair in self.pairs],
        }


def summarise(records: Records) -> Report:
    """Work out every figure from answers alone."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in records.answers.values():
        groups.setdefault((answer.method, answer.budget), []).append(answer)
    cells = [_cell(*way, answers) for way, answers in groups.items()]
    kept = {cell.budget: cell.kept for cell in sorted(cells, key=lambda cell: cell.kept)}
    cells.sort(key=lambda c: (c.method != FULL_METHOD, -kept[c.budget], c.budget, _place(c.method)))
    return Report(tuple(cells), tuple(_pairs(cells, groups)), records)


def _cell(method: str, budget: str, answers: Sequence[Answer]) -> Cell:
    scores = [float(answer.correct) for answer in answers]
    images, tasks = [answer.image for answer in answers], [answer.task for answer in answers]
    found = by_task(scores, images, tasks)
    each = {task.name: found[task.name] for task in TASKS if task.name in found}
    kept = sum(answer.kept for answer in answers) / len(answers)
    return Cell(method, budget, round(kept, 2), Sums.of(scores, images, tasks, WEIGHTS).estimate(), each)


def _pairs(cells: Sequence[Cell], groups: dict[tuple[str, str], list[Answer]]) -> Iterable[Pair]:
    full = next((cell for cell in cells if cell.method == FULL_METHOD), None)
    for cell in cells:
        if cell.method == FULL_METHOD:
            continue
        there = {other.method: other for other in cells if other.budget == cell.budget}
        others = {name: there[name] for name in CONTROLS if name in there}
        splits = [there[name] for name in FIXED_SPLITS if name in there]
        if splits:  # chosen by these very answers, which flatters it
            others[BEST_SPLIT] = max(splits, key=lambda split: split.macro.value)
        if full is not None:
            others[ALL_TOKENS] = full
        for against, other in others.items():
            if other.method == cell.method:
                continue
            found = _compared(groups[cell.method, cell.budget], groups[other.method, other.budget])
            if found is not None:
                yield Pair(cell.method, cell.budget, against, other.method, found)


def _compared(first: Sequence[Answer], second: Sequence[Answer]) -> Comparison | None:
    def question(answer: Answer) -> Key:
        return (*answer.key[:3], "", "")

    known = {question(answer): answer.correct for answer in second}
    both = [answer for answer in first if question(answer) in known]
    if not both:
        return None
    return compare(
        [answer.correct for answer in both],
        [known[question(answer)] for answer in both],
        [answer.image for answer in both],
        [answer.task for answer in both],
        WEIGHTS,
    )


def _place(method: str) -> tuple[int, str]:
    if method == SUBJECT:
        return (0, method)
    if method in CONTROLS:
        return (3, method)
    return (2 if method.startswith("split-") else 1, method)
