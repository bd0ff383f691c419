"""Accuracies with standard errors clustered by image, and paired comparisons. Pure numerics.

Questions about one image are not independent: they share its kept tokens. So images are the sampling unit, and
every error here is that of a mean over images. With weights ``w_t`` of tasks, the macro accuracy is
``sum_t w_t p_t``; image ``c`` moves it by ``d_c = sum_t w_t sum_{i in c, t} (x_i - p_t) / n_t``, and its variance
is ``C / (C - 1) * sum_c d_c**2`` (linearisation of a ratio; for one task with one question per image it is the
usual ``p (1 - p) / (n - 1)``). A paired difference is the same with ``x_i = a_i - b_i``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
RESAMPLES = 2000
_BOOTSTRAP_SEED = 20260314


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error, as shares of 1.

    Args:
        value: The mean.
        error: Its standard error; NaN for fewer than two images.
        questions: Number of answers.
        images: Number of images.
    """

    value: float
    error: float
    questions: int
    images: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired comparison of two methods on the same questions.

    Args:
        difference: Macro accuracy of the first minus that of the second.
        low: 2.5th percentile of the difference in a bootstrap over images.
        high: 97.5th percentile.
        gained: Questions that only the first answers correctly.
        lost: Questions that only the second answers correctly.
        p_value: McNemar's exact test on ``gained`` and ``lost``, as if questions were independent.
        tasks: Difference in each task.
    """

    difference: Estimate
    low: float
    high: float
    gained: int
    lost: int
    p_value: float
    tasks: dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class Sums:
    """Scores summed by image and task, from which all figures here are computed.

    Args:
        scores: ``(C, T)`` sums of scores.
        counts: ``(C, T)`` numbers of questions.
        weights: ``(T,)`` weights of the tasks; they add up to 1.
    """

    scores: Numbers
    counts: Numbers
    weights: Numbers

    @classmethod
    def of(
        cls, scores: Sequence[float], images: Sequence[Any], tasks: Sequence[str], weights: Mapping[str, float]
    ) -> Sums:
        """Sum up scores, one per question.

        Args:
            scores: 1 for a right answer, 0 for a wrong one; for a comparison, differences of these.
            images: Image of each question; any hashable value.
            tasks: Task of each question.
            weights: Weight of each task in the macro accuracy; rescaled over the tasks that have questions.
        """
        present = sorted(set(tasks))
        total = sum(weights[task] for task in present)
        clusters = {image: row for row, image in enumerate(dict.fromkeys(images))}
        columns = {task: column for column, task in enumerate(present)}
        rows = np.array([clusters[image] for image in images], dtype=np.int64)
        column_of = np.array([columns[task] for task in tasks], dtype=np.int64)
        sums = np.zeros((len(clusters), len(present)))
        counts = np.zeros_like(sums)
        np.add.at(sums, (rows, column_of), np.asarray(scores, dtype=np.float64))
        np.add.at(counts, (rows, column_of), 1.0)
        return cls(sums, counts, np.array([weights[task] / total for task in present]))

    def estimate(self) -> Estimate:
        """Return the macro mean with its standard error clustered by image."""
        asked = self.counts.sum(axis=0)  # (T,)
        means = self.scores.sum(axis=0) / asked
        moves = ((self.scores - self.counts * means) / asked) @ self.weights  # (C,)
        images = len(moves)
        error = math.sqrt(images / (images - 1) * float(moves @ moves)) if images > 1 else math.nan
        return Estimate(float(means @ self.weights), error, int(asked.sum()), images)

    def interval(self, resamples: int = RESAMPLES, seed: int = _BOOTSTRAP_SEED) -> tuple[float, float]:
        """Return the 95% percentile interval of the macro mean, bootstrapped over images.

        Resamples that leave a task without questions are skipped; they occur if there are only a few images. NaN
        for fewer than two images.
        """
        images = len(self.counts)
        if images < 2:
            return math.nan, math.nan
        drawn = _draws(images, resamples, seed)
        asked = drawn @ self.counts  # (R, T)
        whole = (asked > 0).all(axis=1)
        means = (drawn[whole] @ self.scores) / asked[whole]
        low, high = np.percentile(means @ self.weights, [2.5, 97.5])
        return float(low), float(high)


@functools.lru_cache(maxsize=4)
def _draws(images: int, resamples: int, seed: int) -> Numbers:
    """Return ``(R, C)`` counts: how often each resample contains each image. The same for all comparisons."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)


def compare(
    first: Sequence[bool],
    second: Sequence[bool],
    images: Sequence[Any],
    tasks: Sequence[str],
    weights: Mapping[str, float],
) -> Comparison:
    """Compare two methods on the same questions.

    Args:
        first: Whether each answer of the first is right.
        second: Whether each answer of the second is right, in the same order.
        images: Image of each question.
        tasks: Task of each question.
        weights: Weights of the tasks in the macro accuracy.
    """
    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    sums = Sums.of(differences, images, tasks, weights)
    gained, lost = differences.count(1.0), differences.count(-1.0)
    each = by_task(differences, images, tasks)
    return Comparison(sums.estimate(), *sums.interval(), gained, lost, mcnemar(gained, lost), each)


def by_task(scores: Sequence[float], images: Sequence[Any], tasks: Sequence[str]) -> dict[str, Estimate]:
    """Return the estimate of each task, in order of appearance; see ``Sums.of``."""
    estimates = {}
    for name in dict.fromkeys(tasks):
        positions = [position for position, task in enumerate(tasks) if task == name]
        some = [scores[position] for position in positions], [images[position] for position in positions]
        estimates[name] = Sums.of(*some, [name] * len(positions), {name: 1.0}).estimate()
    return estimates


def mcnemar(gained: int, lost: int) -> float:
    """Return McNemar's two-sided exact p-value: both methods are equally likely to be right where they differ."""
    differing = gained + lost
    if not differing:
        return 1.0
    fewer = min(gained, lost)
    tail = [_log_binomial(differing, k) - differing * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(each) for each in tail))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
