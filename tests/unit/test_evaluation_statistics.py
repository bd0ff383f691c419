"""Errors and tests against closed forms and simulated data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from promprune_vllm.evaluation.statistics import Sums, compare, mcnemar

ONE = {"t": 1.0}


def test_one_question_per_image_is_the_textbooks_error() -> None:
    scores = [1.0] * 30 + [0.0] * 10
    found = Sums.of(scores, range(40), ["t"] * 40, ONE).estimate()
    assert found.value == 0.75
    assert found.error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert (found.questions, found.images) == (40, 40)


def test_questions_that_share_an_images_luck_count_as_one() -> None:
    scores = [1.0, 0.0, 1.0, 1.0]
    alone = Sums.of(scores, range(4), ["t"] * 4, ONE).estimate()
    images = [image for image in range(4) for _ in range(5)]
    copied = Sums.of([scores[i] for i in images], images, ["t"] * 20, ONE).estimate()
    assert (copied.value, copied.error) == pytest.approx((alone.value, alone.error))


def test_macro_is_the_weighted_mean_and_unasked_tasks_are_left_out() -> None:
    weights = {"a": 0.25, "b": 0.25, "c": 0.5}
    sums = Sums.of([1, 1, 1, 0], [0, 1, 2, 3], ["a", "a", "b", "b"], weights)
    assert sums.estimate().value == pytest.approx(0.75)
    assert sums.weights.tolist() == [0.5, 0.5]
    # Tasks about different images: their variances add up.
    a = Sums.of([1, 0, 1], range(3), ["a"] * 3, weights).estimate()
    b = Sums.of([0, 0, 1], range(3), ["b"] * 3, weights).estimate()
    both = Sums.of([1, 0, 1, 0, 0, 1], range(6), ["a"] * 3 + ["b"] * 3, weights).estimate()
    # C / (C - 1) is 6/5 for the six images and 3/2 for three each.
    assert both.error**2 == pytest.approx((6 / 5) / (3 / 2) * (a.error**2 + b.error**2) / 4)


def test_the_error_is_the_spread_of_repeated_experiments() -> None:
    generator = np.random.default_rng(1)
    weights = {"a": 0.7, "b": 0.3}
    tasks = ["a", "a", "b"] * 60
    images = [image for image in range(60) for _ in range(3)]

    def experiment() -> tuple[float, float, tuple[float, float]]:
        luck = np.repeat(generator.normal(0, 1, 60), 3)
        scores = (luck + generator.normal(0, 1, 180) > 0.3).astype(float)
        sums = Sums.of(scores.tolist(), images, tasks, weights)
        found = sums.estimate()
        return found.value, found.error, sums.interval(resamples=400)

    runs = [experiment() for _ in range(300)]
    values = np.array([run[0] for run in runs])
    assert np.mean([run[1] for run in runs]) == pytest.approx(values.std(), rel=0.12)
    inside = np.mean([low <= values.mean() <= high for _, _, (low, high) in runs])
    assert 0.89 <= inside <= 0.99


def test_a_comparison_pairs_questions() -> None:
    first = [True] * 12 + [False] * 8
    second = [True] * 9 + [False] * 3 + [True] + [False] * 7
    found = compare(first, second, range(20), ["t"] * 20, ONE)
    assert found.difference.value == pytest.approx(0.1)
    assert (found.gained, found.lost) == (3, 1)
    assert found.low < 0.1 < found.high
    d = np.array(first, float) - np.array(second, float)
    assert found.difference.error == pytest.approx(d.std(ddof=1) / math.sqrt(20))
    same = compare(first, first, range(20), ["t"] * 20, ONE)
    assert (same.difference.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert compare(first, second, range(20), ["t"] * 20, ONE) == found  # the bootstrap is seeded


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (5, 0, 2 / 32), (1, 3, 0.625), (4, 4, 1.0), (0, 1, 1.0)]
)
def test_mcnemar_is_the_binomial_test(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_mcnemar_of_many_questions_stays_a_number() -> None:
    assert 0 < mcnemar(3000, 2600) < 1e-6
    assert mcnemar(9000, 100) == pytest.approx(0, abs=1e-300)


def test_one_image_has_no_error() -> None:
    sums = Sums.of([1, 0], [0, 0], ["t", "t"], ONE)
    assert math.isnan(sums.estimate().error)
    assert all(math.isnan(bound) for bound in sums.interval())
