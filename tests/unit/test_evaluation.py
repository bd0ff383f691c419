"""Asking, keeping answers, going on after an interruption, and what is refused, against a server of our own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from promprune_vllm.cli import app
from promprune_vllm.core.registry import methods
from promprune_vllm.demo.scenes.record import CONCENTRATED_TASKS, SCATTERED_TASKS
from promprune_vllm.errors import EvaluationError, UnknownMethodError
from promprune_vllm.evaluation import run, sender
from promprune_vllm.evaluation.plan import Plan, parse_options
from promprune_vllm.evaluation.records import FILE, Log, is_right, read
from promprune_vllm.evaluation.report import CONTROLS, FIXED_SPLITS, SUBJECT
from promprune_vllm.evaluation.sender import Way, jobs
from promprune_vllm.evaluation.target import find_target
from promprune_vllm.evaluation.tasks import TASKS, WEIGHTS, fingerprint, gather, tasks_by_name
from tests.unit.evaluated import RUN, STATE, answers, draw, reply, server

TWO = tasks_by_name(["presence", "big-shape"])
PLAN = Plan((Way.full(4), Way("promprune", 64, 4), Way("random", 64, 2)), TWO, concurrency=3)
ASKED = 2 * 4 + 2 * 4 + 2 * 2
QUIET = Console(quiet=True)


def evaluate(url: str, out: Path, plan: Plan = PLAN) -> run.Report:
    return run.evaluate(find_target(url), plan, out, QUIET, draw)


def test_every_question_is_asked_once_with_its_method_and_budget(tmp_path: Path) -> None:
    with server() as (url, got):
        report = evaluate(url, tmp_path)
    assert len(got) == ASKED
    fields = {(b.get("visual_token_method"), b["visual_token_budget"]) for b in got}
    assert fields == {(None, "full"), ("promprune", 64), ("random", 64)}
    assert all(b["model"] == "demo" and b["temperature"] == 0 for b in got)
    assert all(b["visual_token_escalate"] is False for b in got)
    cells = {(cell.method, cell.budget): cell for cell in report.cells}
    assert cells["promprune", "64"].tasks["presence"].questions == 4
    assert cells["random", "64"].tasks["presence"].questions == 2
    assert (cells["full", "full"].kept, cells["random", "64"].kept) == (576, 64)
    assert cells["promprune", "64"].tasks["presence"].value == 1  # the server says yes, which is right there
    assert cells["promprune", "64"].tasks["big-shape"].value == 0
    assert json.loads((tmp_path / "summary.json").read_text())["cells"]
    assert "### Macro accuracy" in (tmp_path / "summary.md").read_text()


def test_a_picture_is_asked_about_way_by_way() -> None:
    ways = (Way("promprune", 64, 2), Way("promprune", 8, 2))
    order = [(job.picture.seed, job.way.budget, job.item.index) for job in jobs(gather(TWO[:1], 4, draw), ways)]
    assert order == [(0, 64, 0), (0, 64, 1), (0, 8, 0), (0, 8, 1)]


def test_a_shorter_run_asks_the_first_questions_of_a_longer_one() -> None:
    short, long = (gather(TASKS[:2], n, draw) for n in (3, 9))
    first = {(p.kind, p.seed, i.index) for p in short for i in p.items}
    assert first == {(p.kind, p.seed, i.index) for p in long for i in p.items if i.rank < 3}
    assert len(first) == 6


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    count = 0

    def breaking(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        nonlocal count
        count += 1
        return reply(body) if count <= 7 else (500, {"error": {"message": "the engine is dead"}})

    with server(breaking) as (url, _), pytest.raises(EvaluationError, match="status 500: the engine is dead"):
        evaluate(url, tmp_path)
    kept = len(read(tmp_path / FILE).answers)
    assert 5 <= kept <= 7  # three are in flight; those that came are kept
    with (tmp_path / FILE).open("a") as file:
        file.write('{"kind": "scattered", "seed"')  # cut off while it was written
    with server() as (url, got):
        report = evaluate(url, tmp_path)
        assert len(got) == ASKED - kept
        evaluate(url, tmp_path)
        assert len(got) == ASKED - kept
    assert sum(cell.macro.questions for cell in report.cells) == ASKED
    whole = read(tmp_path / FILE)
    assert len(whole.runs) == 3
    assert {"machine", "cores", "versions", "commit", "command", "time"} <= set(whole.runs[0])


def test_a_broken_connection_is_tried_again_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_PAUSE_SECONDS", 0)
    breaks = iter([True, True])

    def shaky(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return (0, {}) if next(breaks, False) else reply(body)

    one = Plan((Way.full(1),), TWO[:1], 1)
    with server(shaky) as (url, got):
        assert evaluate(url, tmp_path / "a", one).cells[0].macro.questions == 1
    assert len(got) == 3
    with server(lambda _: (0, {})) as (url, got), pytest.raises(EvaluationError, match="went away"):
        evaluate(url, tmp_path / "b", one)
    assert len(got) == 3


def test_a_failed_answer_is_asked_for_again_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_PAUSE_SECONDS", 0)
    fails = iter([True, True])
    failure = (500, {"error": {"message": "cache drift"}})
    one = Plan((Way.full(1),), TWO[:1], 1)
    with server(lambda body: failure if next(fails, False) else reply(body)) as (url, got):
        assert evaluate(url, tmp_path / "a", one).cells[0].macro.questions == 1
    assert len(got) == 3
    with server(lambda _: failure) as (url, got), pytest.raises(EvaluationError, match="status 500: cache drift"):
        evaluate(url, tmp_path / "b", one)
    assert len(got) == 3
    with server(lambda _: (400, failure[1])) as (url, got), pytest.raises(EvaluationError, match="status 400"):
        evaluate(url, tmp_path / "c", one)
    assert len(got) == 1


def test_more_is_asked_into_the_same_folder(tmp_path: Path) -> None:
    with server() as (url, got):
        evaluate(url, tmp_path)
        more = Plan((*PLAN.ways, Way("random", 8, 2)), TWO, 3)
        report = evaluate(url, tmp_path, more)
    assert len(got) == ASKED + 4
    assert report.budgets == ("64", "8")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vllm_version": "0.33.0"}, "0.33.0"),
        (
            {"allowed_methods": [{"name": "promprune", "options": {"mu": 0.42}}, *STATE["allowed_methods"][1:]]},
            "mu",
        ),
    ],
)
def test_answers_of_another_server_are_not_gone_on_with(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with server() as (url, _):
        evaluate(url, tmp_path)
    with (
        server(state={**STATE, **change}) as (url, got),
        pytest.raises(EvaluationError, match="with other settings") as refused,
    ):
        evaluate(url, tmp_path)
    assert named in str(refused.value)
    assert not got


def test_other_scenes_are_other_questions(tmp_path: Path) -> None:
    with server() as (url, _):
        evaluate(url, tmp_path)
        with pytest.raises(EvaluationError, match="scenes was"):
            run.evaluate(
                find_target(url), PLAN, tmp_path, QUIET, lambda kind, seed, split: draw(kind, seed + 1, split)
            )


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_text("notes\n")
    with pytest.raises(EvaluationError, match="is not a file of answers"):
        Log(file, {}, RUN)
    assert file.read_text() == "notes\n"
    with pytest.raises(EvaluationError, match="cannot be read"):
        read(tmp_path / "none" / FILE)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("Yes", True), (" yes.\n", True), ("yes .", True), ("yes it is", False), ("", False), ("no", False)],
)
def test_letter_case_spaces_and_a_full_stop_do_not_count(said: str, expected: bool) -> None:
    assert is_right(said, "yes") is expected


# What is refused.


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["eval", "--no-plots", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    assert line.startswith("promprune: ")
    return line


def test_a_server_without_the_plugin_is_refused_in_one_sentence() -> None:
    with server(state=None) as (url, got):
        assert "serves without promprune-vllm: it has no /v1/visual_tokens" in refused("--url", url)
    assert not got


def test_no_server_another_model_another_key_and_an_unprunable_model_are_refused() -> None:
    assert "No server answers at http://127.0.0.1:9 " in refused("--url", "http://127.0.0.1:9")
    with server(api_key="secret") as (url, _):
        assert "rejects the API key" in refused("--url", url)
        assert find_target(url, api_key="secret").model == "demo"
        assert "serves no model 'gpt', only demo" in refused("--url", url, "--api-key", "secret", "--model", "gpt")
    with server(state={**STATE, "prunable": False, "reason": "no tower"}) as (url, _):
        assert "cannot be pruned (no tower)" in refused("--url", url)


def test_a_method_the_server_does_not_allow_is_refused() -> None:
    with server() as (url, got):
        line = refused("--url", url, "--methods", "promprune,divprune")
        assert "does not allow method 'divprune', only promprune, random" in line
        assert "--visual-token-allow-methods divprune" in line
    assert not got


@pytest.mark.parametrize("name", ["evs", "of-another-package"])
def test_a_method_that_compares_frames_is_left_out_of_all_and_refused_by_name(name: str) -> None:
    state = {
        **STATE,
        "allowed_methods": [*STATE["allowed_methods"], {"name": name, "options": {}, "over_frames": True}],
    }
    with server(state=state) as (url, got):
        assert find_target(url).image_methods == ["promprune", "random"]
        assert f"{name!r} compares the frames of a video" in refused(
            "--url", url, "--methods", f"promprune,{name}"
        )
    with server() as (url, got):
        assert "'vidcom2' compares the frames of a video" in refused("--url", url, "--methods", "vidcom2")
    assert not got


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tasks", "presence,ocr"), "There is no task 'ocr'. Choose from presence, count"),
        (("--tasks", "scattered,plate:0"), "'plate:0' has no valid number of questions"),
        (("--methods", "promrune"), "Did you mean 'promprune'"),
        (("--methods", "random:many"), "'random:many' has no valid number of questions"),
        (("--budgets", "64,lots"), "--budgets has an invalid entry 'lots'"),
        (("--budgets", "full"), "all tokens are always measured too"),
    ],
)
def test_options_are_checked_before_a_server_is_started(arguments: tuple[str, ...], says: str) -> None:
    assert says in refused(*arguments)


def test_replies_without_counts_are_refused(tmp_path: Path) -> None:
    bare = {"choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 9}}
    with (
        server(lambda _: (200, bare)) as (url, _),
        pytest.raises(EvaluationError, match=r"no usage\.visual_tokens"),
    ):
        evaluate(url, tmp_path)


def test_replies_without_logprobs_are_refused(tmp_path: Path) -> None:
    def unsure(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, content = reply(body)
        return status, {**content, "choices": [{"message": {"content": "yes"}, "logprobs": None}]}

    with server(unsure) as (url, _), pytest.raises(EvaluationError, match="replies have no logprobs"):
        evaluate(url, tmp_path)


# Confidence.


def test_the_confidence_is_the_smallest_of_the_likeliest_tokens_among_the_first_16(tmp_path: Path) -> None:
    # The second token was chosen though another was likelier; the 17th is beyond the window.
    sure = [(-0.1, -3.0), (-2.0, -0.7), *[(-0.2, -2.0)] * 14, (-5.0, -6.0)]
    with server(lambda body: reply(body, sure=sure)) as (url, got):
        evaluate(url, tmp_path, Plan((Way.full(1), Way("promprune", 64, 1)), TWO[:1], 1))
    assert all((body["logprobs"], body["top_logprobs"]) == (True, 2) for body in got)
    assert [answer.confidence for answer in read(tmp_path / FILE).answers.values()] == [math.exp(-0.7)] * 2


def test_answers_without_confidence_are_read_but_not_gone_on_with(tmp_path: Path) -> None:
    with server() as (url, _):
        evaluate(url, tmp_path)
        head, *lines = map(json.loads, (tmp_path / FILE).read_text().splitlines())
        del head["settings"]["confidence_tokens"]
        for line in lines:
            line.pop("confidence", None)
        (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
        report = run.write(tmp_path)
        assert report.cells
        assert report.curves == ()
        assert "Asking again" not in (tmp_path / "summary.md").read_text()
        with pytest.raises(EvaluationError, match="confidence_tokens was None, is now 16"):
            evaluate(url, tmp_path)


# The plan.


def test_the_plan_is_every_method_the_server_allows_with_every_budget() -> None:
    asked = parse_options("", "64,25%", "", questions=7, concurrency=2, check=str)
    ways = asked.plan(["promprune", "random"]).ways
    assert ways[0] == Way.full(7)
    assert {(way.method, way.budget) for way in ways[1:]} == {
        (method, budget) for method in ("promprune", "random") for budget in (64, "25%")
    }
    assert asked.tasks == TASKS
    some = parse_options("concentrated", "8", "random:3,promprune", questions=7, concurrency=2, check=str)
    assert [task.name for task in some.tasks] == ["big-shape", "big-colour", "plate"]
    assert [(way.method, way.questions) for way in some.plan([]).ways] == [
        ("full", 7),
        ("random", 3),
        ("promprune", 7),
    ]


def test_a_task_may_be_asked_less_than_others() -> None:
    tasks = tasks_by_name(["concentrated", "big-shape:3"])
    assert [(task.name, task.of(10)) for task in tasks] == [("big-shape", 3), ("big-colour", 10), ("plate", 10)]
    items = [
        item
        for picture in gather(tasks_by_name(["scattered:4", "count:1"])[:2], 9, draw)
        for item in picture.items
    ]
    assert sorted((item.task, item.rank) for item in items) == [("count", 0), *(("presence", i) for i in range(4))]


def test_a_star_is_every_other_method() -> None:
    asked = parse_options("", "8", "random:3,*:5", questions=7, concurrency=2, check=_registered)
    ways = asked.plan(["promprune", "random", "uniform"]).ways
    assert {way.method: way.questions for way in ways} == {"full": 5, "random": 3, "promprune": 5, "uniform": 5}


def test_the_demos_scenes_ask_every_task_as_often_as_wanted() -> None:
    assert {(task.kind, task.name) for task in TASKS} == {
        *(("scattered", name) for name in SCATTERED_TASKS),
        *(("concentrated", name) for name in CONCENTRATED_TASKS),
    }
    pictures = gather(TASKS, 30)
    for task in TASKS:
        ranks = [item.rank for picture in pictures for item in picture.items if item.task == task.name]
        assert sorted(ranks) == list(range(30))
        assert {picture.kind for picture in pictures if task.name in {i.task for i in picture.items}} == {
            task.kind
        }
    assert pictures == gather(TASKS, 30)
    assert fingerprint() == fingerprint()


def test_the_names_the_report_knows_are_in_the_registry() -> None:
    assert {SUBJECT, *CONTROLS, *FIXED_SPLITS} <= set(methods())
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    with pytest.raises(UnknownMethodError):
        parse_options("", "8", "nothing-like-it", questions=1, concurrency=1, check=_registered)


def _registered(name: str) -> object:
    from promprune_vllm.core.registry import get_method

    return get_method(name)


def test_answers_are_keyed_by_what_they_answer(tmp_path: Path) -> None:
    given = answers("random", "64", lambda seed, _: seed % 2 == 0, images=3)
    with Log(tmp_path / FILE, {}, RUN) as log:
        for answer in given:
            log.add(answer)
    assert list(read(tmp_path / FILE).answers.values()) == given
