"""The intervals of `promprune tune` hold, also those of what was chosen, and say what is known by other means."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest

from promprune_vllm.tuning.bounds import LEVEL, design_effect, interval, needed
from promprune_vllm.tuning.summary import THRESHOLDS, Cell, summarize
from tests.unit.tuned import drawn

RATES: dict[str, Callable[[float], float]] = {
    "50": lambda confidence: 0.10 * (1.3 - confidence),
    "25": lambda confidence: 0.35 * (1.2 - confidence),
    "10": lambda confidence: 0.90 * (1.1 - confidence),
}
GOAL = 0.85
RUNS = 80
POPULATION = 8_000


@pytest.mark.parametrize(
    ("changed", "questions", "low", "high"),
    [(0, 100, 0.963784, 1.0), (1, 100, 0.945541, 0.999747), (5, 50, 0.781865, 0.966725), (20, 20, 0.0, 0.168433)],
)
def test_independent_questions_have_the_exact_interval(
    changed: int, questions: int, low: float, high: float
) -> None:
    """As scipy's quantiles of the beta distribution give it."""
    found = interval([False] * changed + [True] * (questions - changed), range(questions), 0.05)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_where_nothing_changed_images_count() -> None:
    many, few = (interval([True] * 100, [place % images for place in range(100)], 0.05) for images in (100, 20))
    assert few == interval([True] * 20, range(20), 0.05)
    assert few.low < many.low


def test_questions_about_one_image_are_worth_what_they_tell() -> None:
    clusters = [place // 10 for place in range(400)]
    whole = design_effect([place // 10 >= 8 for place in range(400)], clusters)
    spread = design_effect([place % 10 >= 2 for place in range(400)], clusters)
    assert 9 < whole < 11, "ten answers that are all alike tell one"
    assert spread < 2
    assert design_effect([place >= 80 for place in range(400)], range(400)) == pytest.approx(1)


def test_as_many_questions_as_needed_show_the_goal() -> None:
    number = needed(0.99, 0.01)
    assert interval([True] * number, range(number), 0.01).low >= 0.99
    assert interval([True] * (number - 1), range(number - 1), 0.01).low < 0.99


@functools.cache
def _truth() -> dict[tuple[str, float], float]:
    """The share of unchanged answers of each budget and threshold, of many questions."""
    _, population = drawn(range(POPULATION), RATES, 0)
    return {
        (budget, threshold): sum(
            said.budget == budget and (said.confidence < threshold or said.text == "yes")
            for said in population.said.values()
        )
        / POPULATION
        for budget in RATES
        for threshold in THRESHOLDS
    }


@pytest.mark.parametrize("images", [90, 45], ids=["alone", "in pairs"])
def test_the_interval_of_what_was_chosen_holds(images: int) -> None:
    """In many runs, each with a choice among all cells: in at least as many of them as is said."""
    clusters = [place % images for place in range(90)]
    wrong = below = apart = chosen = 0
    for seed in range(1, RUNS + 1):
        asked, told = drawn(clusters, RATES, seed)
        summary = summarize(told, asked, GOAL)
        cells = [cell for row in summary.rows for cell in row.cells]
        apart += not all(_holds(cell) for cell in cells)
        if summary.chosen is not None:
            chosen += 1
            wrong += not _holds(summary.chosen)
            below += _truth()[summary.chosen.budget, summary.chosen.threshold] < GOAL
    assert chosen > RUNS / 4
    assert max(wrong, below) <= apart <= (1 - LEVEL) * RUNS


def _holds(cell: Cell) -> bool:
    return cell.unchanged.low <= _truth()[cell.budget, cell.threshold] <= cell.unchanged.high


def test_a_choice_without_correction_would_flatter() -> None:
    """The reason for the correction: the best-looking of several equal cells has an interval that is too high."""
    chance, level, runs = random.Random(7), 0.9, 300
    missed = 0
    for _ in range(runs):
        cells = [[chance.random() < level for _ in range(100)] for _ in range(27)]
        missed += interval(max(cells, key=sum), range(100), 0.05).low > level
    assert missed > 0.1 * runs
