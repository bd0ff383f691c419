"""Computes a report from answers: accuracies by method, budget and task, and paired comparisons of methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from promprune_vllm.evaluation.cells import ALL_TOKENS
from promprune_vllm.evaluation.checks import Checked, check_all
from promprune_vllm.evaluation.escalation import Curve, curve
from promprune_vllm.evaluation.records import FULL_METHOD, Answer, Records
from promprune_vllm.evaluation.sender import DOWNSAMPLE
from promprune_vllm.evaluation.statistics import Comparison, Estimate, Sums, by_task, compare
from promprune_vllm.evaluation.tasks import TASKS, WEIGHTS

FIXED_SPLITS = ("split-0", "split-25", "split-50", "split-75", "fastervlm")
"""PromPrune with a fixed salient share; ``fastervlm`` has a share of 1."""
CONTROLS = ("random", "uniform", DOWNSAMPLE)
SUBJECT = "promprune"
BEST_SPLIT = "best fixed split"


@dataclass(frozen=True, slots=True)
class Cell:
    """Accuracy of one method with one budget.

    Args:
        method: Method, or ``full`` if every token was kept.
        budget: Budget of the requests.
        kept: Mean number of tokens kept per image.
        macro: Macro accuracy over all tasks asked.
        tasks: Accuracy of each task.
    """

    method: str
    budget: str
    kept: float
    macro: Estimate
    tasks: dict[str, Estimate]

    def estimate(self, task: str | None) -> Estimate | None:
        """Return the accuracy of a task, if it was asked; for ``None``, the macro accuracy."""
        return self.macro if task is None else self.tasks.get(task)


@dataclass(frozen=True, slots=True)
class Pair:
    """One method compared with another at one budget.

    Args:
        method: The first method.
        budget: Budget of both, unless the second keeps all tokens.
        against: Role of the second: a control's name, ``best fixed split`` or ``all tokens``.
        other: The second method.
        comparison: Comparison on the questions that both were asked.
    """

    method: str
    budget: str
    against: str
    other: str
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of an evaluation.

    Args:
        cells: ``full`` first, then by budget in descending order, then by method.
        pairs: Every method compared with the controls, the best fixed split and all tokens.
        curves: What asking again gives, for every method and budget; empty if answers have no confidence.
        checks: Invention, places and hard questions, for every method and budget.
        records: The answers that the figures are computed from.
    """

    cells: tuple[Cell, ...]
    pairs: tuple[Pair, ...]
    curves: tuple[Curve, ...]
    checks: tuple[Checked, ...]
    records: Records = field(repr=False)

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets of pruned cells, in descending order."""
        return tuple(dict.fromkeys(cell.budget for cell in self.cells if cell.method != FULL_METHOD))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of pruned cells: PromPrune, the published ones, fixed splits, controls."""
        return tuple(sorted({c.method for c in self.cells if c.method != FULL_METHOD}, key=_rank))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that were asked."""
        asked = {name for cell in self.cells for name in cell.tasks}
        return tuple(task.name for task in TASKS if task.name in asked)

    def cell(self, method: str, budget: str | None = None) -> Cell | None:
        """Return the cell of a method (and a budget), if there is one."""
        matches = (c for c in self.cells if c.method == method and budget in (None, c.budget))
        return next(matches, None)

    def against(self, method: str) -> list[Pair]:
        """Return the comparisons of one method."""
        return [pair for pair in self.pairs if pair.method == method]

    def curve(self, method: str, budget: str) -> Curve | None:
        """Return what asking again gives after first tries with a method and budget, if it is known."""
        return next((each for each in self.curves if (each.method, each.budget) == (method, budget)), None)

    def level(self, method: str, budget: str, task: str | None = None) -> Estimate | None:
        """Return an accuracy that is comparable between methods that were asked different questions.

        It is the accuracy of all tokens, on all their questions, plus the paired difference of the method to it;
        its error is that of the difference. Without answers with all tokens, it is the method's own accuracy.

        Args:
            method: Method of a pruned cell.
            budget: Budget of the cell.
            task: One task; ``None`` for the macro accuracy.
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
        """Return everything except the answers, ready for JSON."""
        return {
            "settings": dict(self.records.settings),
            "runs": [dict(run) for run in self.records.runs],
            "cells": [asdict(cell) for cell in self.cells],
            "pairs": [asdict(pair) for pair in self.pairs],
            "curves": [asdict(each) for each in self.curves],
            "checks": [asdict(each) for each in self.checks],
        }


def summarize(records: Records) -> Report:
    """Compute every figure from the answers."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in records.answers.values():
        groups.setdefault((answer.method, answer.budget), []).append(answer)
    cells = [_cell(*way, answers) for way, answers in groups.items()]
    kept = {cell.budget: cell.kept for cell in sorted(cells, key=lambda cell: cell.kept)}
    cells.sort(key=lambda c: (c.method != FULL_METHOD, -kept[c.budget], c.budget, _rank(c.method)))
    curves = tuple(_curves(cells, groups))
    return Report(tuple(cells), tuple(_pairs(cells, groups)), curves, tuple(check_all(groups)), records)


def _cell(method: str, budget: str, answers: Sequence[Answer]) -> Cell:
    scores = [float(answer.correct) for answer in answers]
    images, tasks = [answer.image for answer in answers], [answer.task for answer in answers]
    estimates = by_task(scores, images, tasks)
    each = {task.name: estimates[task.name] for task in TASKS if task.name in estimates}
    kept = sum(answer.kept for answer in answers) / len(answers)
    return Cell(method, budget, round(kept, 2), Sums.of(scores, images, tasks, WEIGHTS).estimate(), each)


def _pairs(cells: Sequence[Cell], groups: dict[tuple[str, str], list[Answer]]) -> Iterable[Pair]:
    full = next((cell for cell in cells if cell.method == FULL_METHOD), None)
    for cell in cells:
        if cell.method == FULL_METHOD:
            continue
        at_budget = {other.method: other for other in cells if other.budget == cell.budget}
        others = {name: at_budget[name] for name in CONTROLS if name in at_budget}
        splits = [at_budget[name] for name in FIXED_SPLITS if name in at_budget]
        if splits:  # selected by these same answers, which favors it
            others[BEST_SPLIT] = max(splits, key=lambda split: split.macro.value)
        if full is not None:
            others[ALL_TOKENS] = full
        for against, other in others.items():
            if other.method == cell.method:
                continue
            comparison = _compare(groups[cell.method, cell.budget], groups[other.method, other.budget])
            if comparison is not None:
                yield Pair(cell.method, cell.budget, against, other.method, comparison)


def _curves(cells: Sequence[Cell], groups: dict[tuple[str, str], list[Answer]]) -> Iterable[Curve]:
    full = next((groups[cell.method, cell.budget] for cell in cells if cell.method == FULL_METHOD), [])
    each = (curve(groups[cell.method, cell.budget], full) for cell in cells if cell.method != FULL_METHOD)
    return filter(None, each)


def _compare(first: Sequence[Answer], second: Sequence[Answer]) -> Comparison | None:
    second_correct = {answer.asked: answer.correct for answer in second}
    both = [answer for answer in first if answer.asked in second_correct]
    if not both:
        return None
    return compare(
        [answer.correct for answer in both],
        [second_correct[answer.asked] for answer in both],
        [answer.image for answer in both],
        [answer.task for answer in both],
        WEIGHTS,
    )


def _rank(method: str) -> tuple[int, str]:
    if method == SUBJECT:
        return (0, method)
    if method in CONTROLS:
        return (3, method)
    return (2 if method.startswith("split-") else 1, method)
