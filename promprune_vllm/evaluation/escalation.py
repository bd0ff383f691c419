"""Asking again at all tokens when an answer is unsure: how accurate that is, and how many tokens it spends.

No question has to be asked twice for this. Without sampling, the second answer is the one that was given at all
tokens; so an answer with a confidence below a threshold is replaced by that one. Accuracies, shares and numbers of
tokens are macro means with the weights of the report, on the questions that were answered at both budgets.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from promprune_vllm.evaluation.records import Answer
from promprune_vllm.evaluation.statistics import Estimate, Sums
from promprune_vllm.evaluation.tasks import TASKS, WEIGHTS

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3)
"""Curves also have the thresholds at which these shares of the questions are asked again."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Point:
    """What one threshold gives.

    Args:
        threshold: Answers with a confidence strictly below it are asked for again; 0 for none.
        again: Share of the questions that are asked again.
        right: Accuracy of the answers that the client gets.
        difference: ``right`` minus the accuracy of all tokens, paired by question.
        tokens: Mean number of visual tokens per question, over both tries.
        share: ``tokens`` as a share of the number without pruning.
    """

    threshold: float
    again: Estimate
    right: Estimate
    difference: Estimate
    tokens: float
    share: float


@dataclass(frozen=True, slots=True)
class Curve:
    """What asking again gives after first tries with one method and budget.

    Args:
        method: Method of the first try.
        budget: Budget of the first try.
        points: By ascending threshold, from 0.
        recommended: The point that ``recommend`` picks.
        tasks: Each task at the recommended threshold.
    """

    method: str
    budget: str
    points: tuple[Point, ...]
    recommended: Point | None
    tasks: dict[str, Point]

    def asking(self, share: float) -> Point | None:
        """Return the point with the smallest threshold at which at least this share is asked again."""
        return next((point for point in self.points if point.again.value >= share - _ROUNDING), None)


def curve(first: Sequence[Answer], full: Sequence[Answer]) -> Curve | None:
    """Compute the curve of a method and budget; ``None`` if no question has a confidence and both answers.

    Args:
        first: Answers of one method with one budget.
        full: Answers with all tokens.
    """
    second_by_question = {answer.asked: answer for answer in full}
    tries = _Tries()
    for answer in first:
        if answer.confidence is not None and (second := second_by_question.get(answer.asked)) is not None:
            tries.add(answer.confidence, answer, second)
    if not tries.first:
        return None
    points = tuple(tries.point(threshold) for threshold in _thresholds(tries))
    best = recommend(points)
    tasks = {} if best is None else tries.by_task(best.threshold)
    return Curve(first[0].method, first[0].budget, points, best, tasks)


def recommend(points: Sequence[Point]) -> Point | None:
    """Return the point with the smallest threshold that loses at most one standard error to all tokens.

    Points that spend more tokens than all tokens do are not considered; ``None`` if no other is good enough.

    Args:
        points: By ascending threshold.
    """
    good = (p for p in points if p.share < 1 and p.difference.value >= -p.difference.error - _ROUNDING)
    return next(good, None)


@dataclass(frozen=True, slots=True)
class _Tries:
    """Questions with the confidence of the first answer, and both answers."""

    confidences: list[float] = field(default_factory=list)
    first: list[Answer] = field(default_factory=list)
    second: list[Answer] = field(default_factory=list)

    def add(self, confidence: float, first: Answer, second: Answer) -> None:
        self.confidences.append(confidence)
        self.first.append(first)
        self.second.append(second)

    def by_task(self, threshold: float) -> dict[str, Point]:
        tries_by_task: defaultdict[str, _Tries] = defaultdict(_Tries)
        for confidence, first, second in zip(self.confidences, self.first, self.second, strict=True):
            tries_by_task[first.task].add(confidence, first, second)
        names = (task.name for task in TASKS if task.name in tries_by_task)
        return {name: tries_by_task[name].point(threshold) for name in names}

    def point(self, threshold: float) -> Point:
        again = [confidence < threshold for confidence in self.confidences]
        tries = list(zip(self.first, self.second, again, strict=True))
        right = [(b if retried else a).correct for a, b, retried in tries]
        tokens = self._mean([a.kept + retried * b.kept for a, b, retried in tries]).value
        return Point(
            threshold,
            self._mean(again),
            self._mean(right),
            self._mean([float(given) - float(b.correct) for given, b in zip(right, self.second, strict=True)]),
            tokens,
            tokens / self._mean([b.kept for b in self.second]).value,
        )

    def _mean(self, scores: Sequence[float]) -> Estimate:
        images, tasks = [answer.image for answer in self.first], [answer.task for answer in self.first]
        return Sums.of(scores, images, tasks, WEIGHTS).estimate()


def _thresholds(tries: _Tries) -> list[float]:
    """Return the thresholds of a curve in ascending order: 0, the fixed ones, and those of the shares."""
    tasks = [answer.task for answer in tries.first]
    asked = Counter(tasks)
    total = sum(WEIGHTS[task] for task in asked)
    weight_by_confidence: defaultdict[float, float] = defaultdict(float)
    for confidence, task in zip(tries.confidences, tasks, strict=True):
        weight_by_confidence[confidence] += WEIGHTS[task] / asked[task] / total
    values = sorted(weight_by_confidence)
    cumulative = np.cumsum([weight_by_confidence[value] for value in values])
    places = [int(np.searchsorted(cumulative, share - _ROUNDING)) for share in SHARES]
    found = [_shortest(values[place], values[place + 1]) for place in places if place + 1 < len(values)]
    return sorted({0.0, *THRESHOLDS, *found})


def _shortest(low: float, high: float) -> float:
    """Return the shortest decimal number above ``low`` and not above ``high``."""
    rounded = (math.floor(high * 10**digits) / 10**digits for digits in range(1, 16))
    return next((number for number in rounded if low < number <= high), high)
