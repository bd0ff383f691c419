"""Intervals of shares that are near 100%, of questions that share images.

With ``F`` of ``n`` answers changed, the interval is Clopper and Pearson's exact one (1934). Questions about one
image are not independent, so ``n`` is divided by the design effect, as Korn and Graubard (1998) do: the variance
of the share clustered by image, over that of independent questions. Estimated from few changed answers, that
effect is often far too small (none changed: no variance at all). So we compute it with one more image, whose
answers all changed and which has as many questions as the image of a question has on average. Where no answer
changed, images count, not questions; the more answers changed, the less the added image weighs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Confidence of all intervals together."""
_STEPS = 60
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Interval:
    """A share with an interval around it, all between 0 and 1."""

    value: float
    low: float
    high: float


def interval(agreed: Sequence[bool], clusters: Sequence[int], error: float) -> Interval:
    """Return the share of answers that agreed, with an interval.

    Args:
        agreed: ``(N,)``; whether each answer agreed; at least one.
        clusters: ``(N,)``; number of each question's image.
        error: Probability that the share is outside, half of it on each side.
    """
    changed = len(agreed) - sum(agreed)
    effective = math.floor(len(agreed) / design_effect(agreed, clusters) + _ROUNDING)
    expected = changed * effective / len(agreed)
    most, fewest = math.ceil(expected - _ROUNDING), math.floor(expected + _ROUNDING)
    # A whole number of changed answers on either side: the interval can only become wider.
    return Interval(
        1 - changed / len(agreed),
        1 - _rate_above(most, effective, error / 2),
        1 - _rate_below(fewest, effective, error / 2),
    )


def design_effect(agreed: Sequence[bool], clusters: Sequence[int]) -> float:
    """Return how many clustered questions are worth one independent question; at least 1."""
    _, rows = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(rows).astype(np.float64)
    changed = np.bincount(rows, weights=1.0 - np.asarray(agreed, dtype=np.float64))
    large = float((sizes**2).sum() / sizes.sum())  # mean size of the image that a question is about
    sizes, changed = np.append(sizes, large), np.append(changed, large)
    share = changed.sum() / sizes.sum()
    if share >= 1:
        return large
    clustered = float(((changed - share * sizes) ** 2).sum())
    return max(1.0, clustered / float(share * (1 - share) * sizes.sum()))


def needed(goal: float, error: float) -> int:
    """Return how many independent questions show a goal if no answer changes."""
    return math.ceil(math.log(error / 2) / math.log(goal))


def _rate_above(changed: int, questions: int, tail: float) -> float:
    """Return the largest rate at which this few or fewer changed answers have the probability ``tail``."""
    if changed >= questions:
        return 1.0
    at_most = _binomial(changed, questions)
    return _solved(lambda rate: at_most(rate) >= tail)


def _rate_below(changed: int, questions: int, tail: float) -> float:
    """Return the smallest rate at which this many or more changed answers have the probability ``tail``."""
    if not changed:
        return 0.0
    at_most = _binomial(changed - 1, questions)
    return _solved(lambda rate: 1 - at_most(rate) <= tail)


def _solved(holds: Callable[[float], bool]) -> float:
    """Return the rate up to which a condition holds."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _binomial(changed: int, questions: int) -> Callable[[float], float]:
    """Return the probability of at most this many changed answers, by their rate; between 0 and 1."""
    numbers = np.arange(changed + 1)
    ways = np.cumsum(np.log(np.concatenate([[1.0], (questions - numbers[:-1]) / (numbers[:-1] + 1)])))

    def at_most(rate: float) -> float:
        logs = ways + numbers * math.log(rate) + (questions - numbers) * math.log1p(-rate)
        return float(np.exp(logs).sum())

    return at_most
