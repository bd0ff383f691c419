"""What a mean hides: invention, places, and questions that a lower resolution fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from promprune_vllm.evaluation.checks import CHECKS, HARD
from promprune_vllm.evaluation.records import Answer
from promprune_vllm.evaluation.report import Report, summarize
from promprune_vllm.evaluation.tasks import TASKS, gather
from promprune_vllm.evaluation.text import checks, markdown
from tests.unit.evaluated import answers, records


def said(method: str, budget: str, words: Callable[[int, int], tuple[str, str]], *, task: str) -> list[Answer]:
    """Two answers about each of 40 images; the function gives what is right and what was said."""
    changed = []
    for answer in answers(method, budget, lambda *_: True, task=task):
        expected, word = words(answer.seed, answer.index)
        changed.append(replace(answer, expected=expected, said=word, correct=word == expected))
    return changed


def share(report: Report, check: str, method: str, budget: str = "64") -> tuple[float, int]:
    (found,) = [
        each.share for each in report.checks if (each.check, each.method, each.budget) == (check, method, budget)
    ]
    return found.value, found.questions


def test_what_is_invented_is_told_apart_from_what_is_missed() -> None:
    def words(seed: int, index: int) -> tuple[str, str]:
        """The first question asks for what is there: a quarter is missed. Of what is not, a half is invented."""
        if index == 0:
            return "yes", "No." if seed % 4 == 0 else " Yes"
        return "no", "yes" if seed % 2 == 0 else "no"

    report = summarize(records(said("promprune", "64", words, task="presence")))
    assert share(report, "invented", "promprune") == (0.5, 40)
    assert share(report, "missed", "promprune") == (0.25, 40)
    assert share(report, "untrue", "promprune") == (pytest.approx(20 / 50), 50)
    assert {each.check for each in report.checks} == {"invented", "missed", "untrue"}


def test_counts_are_too_many_or_too_few() -> None:
    given = ("2", "3", "1", "two")
    report = summarize(records(said("random", "64", lambda seed, _: ("2", given[seed % 4]), task="count")))
    assert share(report, "too-many", "random") == share(report, "too-few", "random") == (0.25, 80)


def test_places_are_the_mean_of_both_tasks() -> None:
    quarter = answers("random", "64", lambda seed, _: seed % 2 == 0, task="where")
    side = [
        replace(a, index=a.index + 2) for a in answers("random", "64", lambda *_: True, task="relation", images=10)
    ]
    assert share(summarize(records(quarter, side)), "places", "random") == (0.75, 100)


def test_hard_questions_are_those_that_all_tokens_get_right_and_a_lower_resolution_wrong() -> None:
    report = summarize(
        records(
            answers("full", "full", lambda seed, _: seed < 30),
            answers("downsample", "64", lambda seed, _: seed < 10),
            answers("downsample", "8", lambda *_: False),
            answers("promprune", "64", lambda seed, _: seed % 2 == 0),
            answers("promprune", "8", lambda seed, _: seed < 6),
            answers("fsr", "64", lambda seed, _: seed < 15, images=20),
        )
    )
    assert share(report, HARD, "promprune") == (0.5, 40)
    assert share(report, HARD, "promprune", "8") == (0.2, 60)
    assert share(report, HARD, "fsr") == (0.5, 20)  # it was asked half of the questions
    assert {each.method for each in report.checks if each.check == HARD} == {"promprune", "fsr"}
    text = checks(report)
    assert "| `promprune` | 50.0 ± 11.5 (40) | 20.0 ± 7.4 (60) |" in text
    assert "| `fsr` | 50.0 ± 16.7 (20) | - |" in text
    assert "| `promprune` | 80 | +25.0 ± 10.6 | +15.0 ± 5.7 |" in text  # minus downsample
    assert "the server's method, which takes means of tokens" in text
    assert [each for each in report.as_document()["checks"] if each["check"] == HARD]
    assert "### What a mean hides" in markdown(report)
    assert "### What a mean hides" not in markdown(report, checked=False)


def test_without_a_lower_resolution_nothing_is_hard() -> None:
    report = summarize(
        records(answers("full", "full", lambda *_: True), answers("random", "64", lambda *_: False))
    )
    assert not [each for each in report.checks if each.check == HARD]
    assert "Hard questions" not in checks(report)


def test_checks_are_of_tasks_that_exist() -> None:
    assert {task for check in CHECKS for task in check.tasks} <= {task.name for task in TASKS}


@pytest.mark.parametrize("questions", [60, 240])
def test_the_scenes_ask_for_as_much_that_is_there_as_that_is_not(questions: int) -> None:
    (presence,) = [task for task in TASKS if task.name == "presence"]
    items = [item for picture in gather([presence], questions) for item in picture.items]
    there = sum(item.answer == "yes" for item in items)
    assert abs(there - questions / 2) <= 2
