"""Asking again when an answer is unsure: curves against figures computed by hand, formulas and a bootstrap."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from promprune_vllm.evaluation.escalation import SHARES, THRESHOLDS, Curve, Point, curve, recommend
from promprune_vllm.evaluation.records import Answer
from promprune_vllm.evaluation.report import Report, summarize
from promprune_vllm.evaluation.statistics import Estimate
from promprune_vllm.evaluation.tasks import WEIGHTS
from promprune_vllm.evaluation.text import asking_again, recommendation, terminal_asking_again
from tests.unit.evaluated import answers, records

SURE = {(0, 0): 0.4, (1, 0): 0.9, (2, 1): 0.5, (3, 0): 1.0, (3, 1): 1.0}
"""Image and question -> confidence; 0.95 for others."""
FIRST = answers(
    *("promprune", "64", lambda *at: at not in ((0, 0), (1, 0))),
    images=4,
    confidence=lambda *at: SURE.get(at, 0.95),
)
FULL = answers("full", "full", lambda *at: at != (2, 1), images=4)


def known(first: list[Answer], full: list[Answer]) -> Curve:
    found = curve(first, full)
    assert found is not None
    return found


def at(found: Curve, threshold: float) -> Point:
    (point,) = [point for point in found.points if point.threshold == threshold]
    return point


@pytest.mark.parametrize(
    ("threshold", "again", "right", "tokens"),
    [
        (0.0, 0, 6, 64),
        (0.5, 1, 7, 64 + 576 / 8),  # 0.4 alone: 0.5 is not below 0.5
        (0.6, 2, 6, 64 + 2 * 576 / 8),  # what all tokens get wrong is now wrong
        (0.9, 2, 6, 64 + 2 * 576 / 8),  # 0.9 is not below 0.9
        (0.95, 3, 7, 64 + 3 * 576 / 8),
        (0.999, 6, 7, 64 + 6 * 576 / 8),  # and 1.0 is never below anything
    ],
)
def test_unsure_answers_are_replaced_and_both_tries_are_paid(
    threshold: float, again: int, right: int, tokens: float
) -> None:
    point = at(known(FIRST, FULL), threshold)
    assert (point.again.value, point.right.value) == pytest.approx((again / 8, right / 8))
    assert point.difference.value == pytest.approx((right - 7) / 8)
    assert (point.tokens, point.share) == pytest.approx((tokens, tokens / 576))
    assert (point.right.questions, point.right.images) == (8, 4)


def test_the_error_of_a_difference_is_that_of_paired_images() -> None:
    found = at(known(FIRST, FULL), 0.0)
    by_image = [-0.5, -0.5, 0.5, 0.0]
    assert found.difference.error == pytest.approx(np.std(by_image, ddof=1) / math.sqrt(4))
    assert found.right.error == pytest.approx(np.std([0.5, 0.5, 1, 1], ddof=1) / math.sqrt(4))


def test_only_questions_with_a_confidence_and_both_answers_count() -> None:
    unknown = [replace(answer, confidence=None) for answer in FIRST]
    assert curve(unknown, FULL) is None
    assert curve(FIRST, []) is None
    assert curve([], FULL) is None
    some = known([*unknown[:4], *FIRST[4:]], FULL[:6])  # two questions, about the third image
    assert some.points[0].right.questions == 2
    assert (some.points[0].right.value, some.points[0].difference.value) == (1, 0.5)
    assert known(FIRST, FULL[::-1]) == known(FIRST, FULL)


def test_tasks_are_pooled_as_in_the_report() -> None:
    wrong = answers(*("promprune", "64", lambda *_: False), confidence=lambda _, index: (0.3, 0.97)[index])
    plates = answers("promprune", "64", lambda *_: True, images=80, task="plate", confidence=lambda *_: 0.97)[80:]
    full = answers("full", "full", lambda *_: True, images=80)
    point = at(known([*wrong, *plates], full), 0.5)
    # Presence weighs 1/7 and plates 1/21: half of the questions with three quarters of the weight.
    assert (point.again.value, point.right.value) == pytest.approx((0.375, 0.375 + 0.25))
    assert point.tokens == pytest.approx(64 + 0.375 * 576)
    report = summarize(records(wrong, plates, full))
    cell, found = report.cell("promprune", "64"), report.curve("promprune", "64")
    assert cell is not None
    assert found is not None
    assert found.points[0].right == cell.macro
    (pair,) = [pair for pair in report.against("promprune") if pair.against == "all tokens"]
    assert found.points[0].difference == pair.comparison.difference


def test_errors_are_those_of_a_bootstrap_over_images() -> None:
    generator = np.random.default_rng(3)
    luck = generator.random((80, 2, 3))  # of the image and question: the first answer, its confidence, the second
    luck[:, 1] = np.where(generator.random((80, 1)) < 0.5, luck[:, 0], luck[:, 1])  # images have luck of their own
    first = [
        replace(answer, task=("presence", "plate")[answer.index])
        for answer in answers(
            *("promprune", "64", lambda *at: bool(luck[at][0] < 0.6)),
            images=80,
            confidence=lambda *at: float(luck[at][1]),
        )
    ]
    full = answers("full", "full", lambda *at: bool(luck[at][2] < 0.9), images=80)
    point = at(known(first, full), 0.5)
    right = np.where(luck[..., 1] < 0.5, luck[..., 2] < 0.9, luck[..., 0] < 0.6).astype(float)
    difference = right - (luck[..., 2] < 0.9)
    weights = np.array([WEIGHTS["presence"], WEIGHTS["plate"]]) / (WEIGHTS["presence"] + WEIGHTS["plate"])
    drawn = generator.integers(0, 80, (4000, 80))
    for estimate, values in ((point.right, right), (point.difference, difference)):
        assert estimate.value == pytest.approx(values.mean(axis=0) @ weights)
        assert estimate.error == pytest.approx((values[drawn].mean(axis=1) @ weights).std(), rel=0.06)


def test_some_thresholds_ask_round_shares_again() -> None:
    spread = answers(
        *("promprune", "64", lambda *_: True), images=10, confidence=lambda seed, index: 0.04 * seed + 0.02 * index
    )
    found = known(spread, answers("full", "full", lambda *_: True, images=10))
    added = [point for point in found.points if point.threshold not in (0, *THRESHOLDS)]
    # The shortest decimals that separate the first 1, 2, 3, 4 and 6 of 20 confidences from the next.
    assert [point.threshold for point in added] == [0.02, 0.04, 0.06, 0.08, 0.12]
    assert [point.again.value for point in added] == pytest.approx(SHARES)
    for share in SHARES:
        point = found.asking(share)
        assert point is not None
        assert point.again.value == pytest.approx(share)


def test_equal_confidences_cannot_be_asked_again_in_part() -> None:
    alike = answers("promprune", "64", lambda *_: True, images=5, confidence=lambda *_: 0.8)
    found = known(alike, answers("full", "full", lambda *_: True, images=5))
    assert [point.threshold for point in found.points] == [0, *THRESHOLDS]
    assert [at(found, threshold).again.value for threshold in (0.8, 0.85)] == [0, 1]
    sure = known([replace(answer, confidence=1.0) for answer in alike], FULL)
    assert sure.asking(0.05) is None


# What is recommended.


def made(threshold: float, difference: float, error: float, share: float = 0.5) -> Point:
    whatever = Estimate(0.5, 0.1, 80, 40)
    return Point(threshold, whatever, whatever, Estimate(difference, error, 80, 40), 576 * share, share)


@pytest.mark.parametrize(
    ("points", "threshold"),
    [
        ([made(0, -0.04, 0.01), made(0.5, -0.02, 0.01), made(0.9, -0.01, 0.01), made(0.99, 0, 0)], 0.9),
        ([made(0, 0.01, 0.01), made(0.5, 0.0, 0.0)], 0),
        ([made(0, -0.04, 0.01), made(0.5, 0.0, 0.0, share=1.01)], None),  # cheaper to ask with all tokens at once
        ([made(0, -0.04, math.nan)], None),
        ([], None),
    ],
)
def test_the_smallest_threshold_within_one_error_is_recommended(
    points: list[Point], threshold: float | None
) -> None:
    best = recommend(points)
    assert (best and best.threshold) == threshold


@pytest.fixture
def report() -> Report:
    """Every fifth image is answered wrongly at 64 tokens, and with little confidence; at 8 it is not noticed."""

    def right(seed: int, index: int) -> bool:
        return seed % 5 != 0

    return summarize(
        records(
            answers("full", "full", lambda *_: True),
            answers("promprune", "64", right, confidence=lambda *at: 0.98 if right(*at) else 0.7),
            answers("promprune", "8", right, confidence=lambda *_: 1.0),
            answers("random", "64", right, confidence=lambda *at: 0.7 if right(*at) else 0.98),
        )
    )


def test_recommendations_are_sentences(report: Report) -> None:
    assert [recommendation(each) for each in report.curves if each.method == "promprune"] == [
        "First try 64 with `promprune`, ask again below 0.8: "
        "100.0 ± 0.0% right (all tokens 100.0%), 31% of the tokens.",
        "First try 8 with `promprune`: no threshold is within one standard error of all tokens and spends fewer.",
    ]
    good = known([replace(answer, correct=True) for answer in FIRST], FULL)
    assert recommendation(good) == (
        "First try 64 with `promprune`, never ask again: 100.0 ± 0.0% right (all tokens 87.5%), 11% of the tokens."
    )


def test_tables_show_what_asking_again_gives(report: Report) -> None:
    text = asking_again(report)
    assert "| 64 | never | 0.0% | 80.0 ± 6.4 | -20.0 ± 6.4 | 64 | 11% |" in text
    assert "| 64 | 0.8 | 20.0% | 100.0 ± 0.0 | +0.0 ± 0.0 | 179 | 31% |" in text
    assert "| all tokens |  | 100.0 ± 0.0 |\n| 64 | never | 80.0 ± 6.4 |\n| 64 | 0.8 | 100.0 ± 0.0 (20%) |" in text
    # Those of `random` that are not right are surer than the others: these are asked again first, and all at once.
    assert "| `promprune` | +0.0 ± 0.0 (20%) | - |\n| `random` | -20.0 ± 6.4 (80%) | - |" in text
    assert "| `promprune` | 31% (0.8) | - |\n| `random` | - | - |" in text
    assert terminal_asking_again(report).row_count == 2


def test_the_document_has_every_curve(report: Report) -> None:
    first, *rest = report.as_document()["curves"]
    assert [(each["method"], each["budget"]) for each in rest] == [("random", "64"), ("promprune", "8")]
    assert (first["recommended"]["threshold"], first["tasks"]["presence"]["again"]["value"]) == (0.8, 0.2)
    assert {"threshold", "again", "right", "difference", "tokens", "share"} == first["points"][0].keys()
