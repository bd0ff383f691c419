"""Accuracies with standard errors clustered by image, and paired comparisons. Knows numbers only.

Questions about one image share its luck: the tokens kept of it serve them all. So images are what is drawn, and
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
        error: Its standard error; not a number where fewer than two images were asked about.
        questions: Answers it is made of.
        images: Images they are about.
    """

    value: float
    error: float
    questions: int
    images: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One way of keeping tokens against another, on the same questions.

    Args:
        difference: Of the macro accuracies, first less second.
        low: 2.5th percentile of it when images are drawn anew.
        high: 97.5th percentile.
        gained: Questions only the first answers rightly.
        lost: Questions only the second answers rightly.
        p_value: McNemar's exact test on these two, as if questions were independent.
        tasks: The difference in each task by itself.
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
    """Scores added up by image and task: all that any of these figures needs.

    Args:
        scores: ``(C, T)`` sums of scores.
        counts: ``(C, T)`` numbers of questions.
        weights: ``(T,)`` of the tasks, adding up to 1.
    """

    scores: Numbers
    counts: Numbers
    weights: Numbers

    @classmethod
    def of(
        cls, scores: Sequence[float], images: Sequence[Any], tasks: Sequence[str], weights: Mapping[str, float]
    ) -> Sums:
        """Add up scores, one per question.

        Args:
            scores: 1 for right, 0 for wrong; for a comparison the difference of two such.
            images: What each question is about: anything hashable.
            tasks: The task of each.
            weights: Of each task in the macro accuracy; tasks without questions are left out, the rest fills in.
        """
        present = sorted(set(tasks))
        total = sum(weights[task] for task in present)
        clusters = {image: row for row, image in enumerate(dict.fromkeys(images))}
        columns = {task: column for column, task in enumerate(present)}
        rows = np.array([clusters[image] for image in images], dtype=np.int64)
        places = np.array([columns[task] for task in tasks], dtype=np.int64)
        sums = np.zeros((len(clusters), len(present)))
        counts = np.zeros_like(sums)
        np.add.at(sums, (rows, places), np.asarray(scores, dtype=np.float64))
        np.add.at(counts, (rows, places), 1.0)
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
        """Return the 95 % percentile interval of the macro mean when images are drawn anew, with replacement.

        Draws that leave a task without questions say nothing and are left out; with a handful of images there are
        such. Not numbers where fewer than two images were asked about.
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
    """Return ``(R, C)``: how often each draw of as many images takes each. Equal for all comparisons."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)


def compare(
    first: Sequence[bool],
    second: Sequence[bool],
    images: Sequence[Any],
    tasks: Sequence[str],
    weights: Mapping[str, float],
) -> Comparison:
    """Compare two ways on the same questions.

    Args:
        first: Whether each answer of the first is right.
        second: Those of the second, in the same order.
        images: What each question is about.
        tasks: The task of each.
        weights: Of the tasks in the macro accuracy.
    """
    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    sums = Sums.of(differences, images, tasks, weights)
    gained, lost = differences.count(1.0), differences.count(-1.0)
    each = by_task(differences, images, tasks)
    return Comparison(sums.estimate(), *sums.interval(), gained, lost, mcnemar(gained, lost), each)


def by_task(scores: Sequence[float], images: Sequence[Any], tasks: Sequence[str]) -> dict[str, Estimate]:
    """Return the estimate of each task by itself, in order of appearance; see ``Sums.of``."""
    each = {}
    for name in dict.fromkeys(tasks):
        mine = [place for place, task in enumerate(tasks) if task == name]
        some = [scores[place] for place in mine], [images[place] for place in mine]
        each[name] = Sums.of(*some, [name] * len(mine), {name: 1.0}).estimate()
    return each


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p-value that two ways are right equally often where they differ."""
    differing = gained + lost
    if not differing:
        return 1.0
    fewer = min(gained, lost)
    tail = [_log_binomial(differing, k) - differing * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(each) for each in tail))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
