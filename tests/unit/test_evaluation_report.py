"""What a report says, in text and in pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from promprune_vllm.cli import app
from promprune_vllm.evaluation import plots
from promprune_vllm.evaluation.records import FILE, Log
from promprune_vllm.evaluation.report import Report, summarize
from promprune_vllm.evaluation.text import lost_table, macro_table, markdown, pairs_table, tasks_table, terminal
from tests.unit.evaluated import RUN, answers, records


@pytest.fixture
def report() -> Report:
    return summarize(
        records(
            answers("full", "full", lambda *_: True),
            *(answers("promprune", budget, lambda seed, _: seed % 5 != 0) for budget in ("64", "8")),
            *(answers("random", budget, lambda seed, _: seed % 2 == 0) for budget in ("64", "8")),
            answers("split-0", "64", lambda seed, _: seed % 4 != 0),
            answers("split-50", "64", lambda seed, _: seed % 3 != 0),
            answers("promprune", "64", lambda seed, index: index == 0, task="plate", images=80)[80:],
        )
    )


def test_macro_table(report: Report) -> None:
    lines = macro_table(report).splitlines()
    assert lines[0] == "| method | 64 | 8 |"
    assert lines[2] == "| all tokens | 100.0 ± 0.0 |  |"
    # 40 images with two equal answers each: sqrt(.8 * .2 / 39).
    assert lines[3].endswith("| 80.0 ± 6.4 |")
    assert [line.split("|")[1].strip(" `") for line in lines[3:]] == ["promprune", "split-0", "split-50", "random"]
    assert lines[4] == "| `split-0` | 75.0 ± 6.9 | - |"


def test_losses_to_all_tokens_are_paired(report: Report) -> None:
    lines = lost_table(report).splitlines()
    assert lines[0] == "| method | questions | 64 | 8 |"
    # The plates that all tokens were not asked about are questions, and no part of the difference.
    assert lines[2] == "| `promprune` | 160 | -20.0 ± 6.4 | -20.0 ± 6.4 |"
    assert lines[3] == "| `split-0` | 80 | -25.0 ± 6.9 | - |"
    assert "### Difference to all tokens on the same questions, points" in markdown(report)


def test_levels_are_comparable_though_methods_were_asked_differently_much() -> None:
    report = summarize(
        records(
            answers("full", "full", lambda seed, _: seed < 30),
            answers("promprune", "64", lambda seed, _: seed < 20),
            answers("fsr", "64", lambda seed, _: seed < 20, images=20),  # the easy half: 100%, as all tokens have
        )
    )
    cell, level = report.cell("fsr", "64"), report.level("fsr", "64")
    assert cell is not None
    assert level is not None
    assert (cell.macro.value, level.value, level.questions) == (1.0, 0.75, 40)
    assert report.level("fsr", "64", "presence") == level
    prompruned = report.level("promprune", "64")
    assert prompruned is not None
    assert prompruned.value == pytest.approx(0.5)  # what it was found to be: asked all that all tokens were asked
    assert report.level("fsr", "64", "plate") is None
    assert report.level("fsr", "8") is None


def test_without_all_tokens_a_level_is_the_plain_accuracy() -> None:
    report = summarize(records(answers("promprune", "64", lambda seed, _: seed < 20)))
    cell = report.cell("promprune", "64")
    assert cell is not None
    assert report.level("promprune", "64") == cell.macro
    assert report.level("promprune", "64", "presence") == cell.tasks["presence"]


def test_pairs_name_the_best_fixed_split_and_everything_that_was_asked(report: Report) -> None:
    first, second = pairs_table(report).splitlines()[2:]
    budget, random, uniform, downsample, split, full = (cell.strip() for cell in first.strip("|").split("|"))
    assert budget == "64"
    assert random.startswith("+30.0 (")
    assert uniform == downsample == "-"
    assert split.startswith("+5.0 (")
    assert split.endswith("; split-0")
    assert full.startswith("-20.0 (")
    assert full.endswith("p < 0.001")
    assert second.startswith("| 8 | +30.0 (")
    (against,) = [pair for pair in report.against("promprune") if pair.budget == "64" and pair.against == "random"]
    assert (against.comparison.gained, against.comparison.lost) == (32, 8)
    assert against.comparison.difference.questions == 80  # the plates were asked of one of the two alone


def test_tasks_and_macro_weights(report: Report) -> None:
    head, _, full, promprune, *_ = tasks_table(report, "64").splitlines()
    assert head == "| method | presence | plate | macro |"
    assert full == "| all tokens | 100.0 ± 0.0 | - | 100.0 ± 0.0 |"
    # Presence weighs 1/7 and plates 1/21: (3 * 80 + 50) / 4.
    assert promprune.startswith("| `promprune` | 80.0 ± 6.4 | 50.0 ± 0.0 | 72.5 ± ")


def test_the_text_says_what_it_is_made_of(report: Report) -> None:
    text = markdown(report)
    assert "vLLM 0.32.0; run on a machine, 2 cores, commit 0123456789ab: `promprune eval`." in text
    assert "one standard error, clustered by image" in text
    assert "### Every task, budget 8" in text
    assert terminal(report).row_count == 5


def test_plots_are_pictures_and_always_the_same(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = plots.save(report, tmp_path)
    assert {file.name for file in written} == {
        f"{name}.{kind}" for name in ("accuracy-budget", "tasks-64", "tasks-8") for kind in ("png", "svg")
    }
    with Image.open(tmp_path / "accuracy-budget.png") as picture:
        assert min(picture.size) > 400
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 5
    first = {file: file.read_bytes() for file in written}
    assert first[tmp_path / "tasks-64.svg"].lstrip().startswith(b"<?xml")
    plots.save(report, tmp_path)
    assert {file: file.read_bytes() for file in written} == first


def test_the_plot_of_asking_again_has_lines_that_start_at_fixed_budgets() -> None:
    pytest.importorskip("matplotlib")
    full = answers(
        "full", "full", lambda seed, _: seed < 40, images=80
    )  # half right; all of what others were asked
    ways = [(method, budget) for method in ("promprune", "random") for budget in ("64", "25%", "8")]
    pruned = [
        answers(*way, lambda seed, _: seed % 4 != 0, confidence=lambda seed, _: (1, 2, 3, 4)[seed % 4] / 4)
        for way in ways
    ]
    wide, close = plots.asking_again(summarize(records(full, *pruned))).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in wide.get_lines()}
    fixed, again = drawn["promprune, fixed budget"], drawn["promprune, asking again"]
    assert fixed == [[144, 25], [64, 25], [8, 25]]
    assert (again[0], again[-1]) == ([64, 25], [64 + 0.75 * 576, 50])  # a quarter is as sure as one can be
    assert drawn["all tokens"] == [[576, 50]]
    assert close.get_ylim() == (23, 52)
    assert {"random, fixed budget", "random, asking again"} <= drawn.keys()
    assert not any(str(line.get_label()).startswith("random") for line in close.get_lines())


def test_a_folder_is_reported_on_without_a_server(tmp_path: Path) -> None:
    settings = records().settings
    with Log(tmp_path / FILE, settings, RUN) as log:
        for answer in answers("promprune", "64", lambda *_: True, images=2):
            log.add(answer)
    result = CliRunner().invoke(app, ["eval", "--report-only", "--no-plots", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "100.0" in result.output
    assert (tmp_path / "summary.md").is_file()
