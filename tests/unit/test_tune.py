"""`promprune tune` against a server of our own: what is read, asked, audited, refused, said and drawn."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from promprune_vllm.cli import app
from promprune_vllm.demo.scenes.record import TASKS
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.records import FILE
from promprune_vllm.tuning import demo_questions, text
from promprune_vllm.tuning import questions as read_questions
from promprune_vllm.tuning.page import page
from promprune_vllm.tuning.questions import load
from promprune_vllm.tuning.records import Records, Said, read
from promprune_vllm.tuning.run import PAGE
from promprune_vllm.tuning.summary import THRESHOLDS, summarize
from tests.unit.evaluated import server
from tests.unit.tuned import TUNED_STATE, Server, file_of, png, questions, records, said, url

LINES = [
    {"image": "red.png", "question": "what is it?", "answer": "yes", "id": "first"},
    {"image": ["red.png", url(png(9))], "question": "a hard one?", "answer": "Yes."},
    {"image": url(png(3)), "question": "another hard one?"},
]


def tune(address: str, folder: Path, *more: object, lines: list[Any] = LINES) -> Result:
    file = file_of(folder, lines)
    words = ("--url", address, "--questions", file, "--out", folder / "out", *more)
    return CliRunner().invoke(app, ["tune", *map(str, words)], env={"COLUMNS": "200"})


def serving(respond: Server, **state: Any) -> AbstractContextManager[tuple[str, list[dict[str, Any]]]]:
    return server(respond, state={**TUNED_STATE, **state}, tokens=respond.tokens)


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_all_faulty_lines_are_named_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    lines: list[Any] = [
        *({"image": "red.png", "question": "?"}, {"image": "none.png", "question": "?"}, "", "{", [1]),
        *({"image": "red.png"}, {"image": "red.png", "question": "?", "anwser": "x"}, {"question": "?"}),
        *({"image": [], "question": "?"}, {"image": "notes.txt", "question": "?"}),
        *(
            {"image": "data:image/png;base64,!", "question": "?"},
            {"image": "http://127.0.0.1:1/a", "question": "?"},
        ),
        *({"image": "red.png", "question": "?", "answer": 3}, {"image": "red.png", "question": "?", "id": 1}),
    ]
    with serving(Server()) as (address, got):
        result = tune(address, tmp_path, lines=lines)
    assert result.exit_code == 2
    assert got == []
    assert "has 12 faulty lines; nothing was asked" in result.stderr
    named = [
        int(line.split(":")[0].split()[1]) for line in result.stderr.splitlines() if line.startswith("  line ")
    ]
    assert named == [2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    for wrong in ("'anwser'; fields are answer, id, image, question", "id '1' is that of line 1 too", "base64"):
        assert wrong in result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--goal", "100%"), "--goal must be a share of the answers above 0 and below 100%"),
        (("--goal", "some"), "--goal must be a share"),
        (("--budgets", "full"), "all tokens are always measured too"),
        (("--methods", "random"), "There is no method to choose: random is only compared with"),
        (("--methods", "divprune"), "does not allow method 'divprune'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    with serving(Server()) as (address, got):
        result = tune(address, tmp_path, *words)
    assert (result.exit_code, got) == (2, [])
    assert told in result.stderr.replace("\n", " ")


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert "--demo-questions 200" in CliRunner().invoke(app, ["tune"]).stderr
    with pytest.raises(EvaluationError, match="has no questions"):
        load(file_of(tmp_path, [""]), tmp_path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        load(tmp_path / "none", tmp_path)


def test_an_image_at_an_address_is_fetched_once(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.png").write_bytes(png(7))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.02,))
        thread.start()
        address = f"http://127.0.0.1:{web.server_port}"
        with pytest.raises(EvaluationError, match=r"line 1: image .*none.png cannot be fetched .*404"):
            load(file_of(tmp_path, [{"image": f"{address}/none.png", "question": "?"}]), tmp_path / "images")
        file = file_of(tmp_path, [{"image": f"{address}/a.png", "question": each} for each in "ab"])
        first = load(file, tmp_path / "images")
        web.shutdown()
        thread.join()
    assert load(file, tmp_path / "images") == first, "a resumed run needs no network"
    (path,) = {each.images[0] for each in first}
    assert path.read_bytes() == png(7)


def test_questions_that_share_images_are_one_group(tmp_path: Path) -> None:
    lines = [{"image": each, "question": "?"} for each in (url(png(1)), [url(png(2)), url(png(3))], url(png(4)))]
    lines += [{"image": [url(png(4)), url(png(2))], "question": "?"}, {"image": url(png(1)), "question": "?"}]
    assert [each.cluster for each in load(file_of(tmp_path, lines), tmp_path / "images")] == [0, 1, 1, 1, 0]


def test_answers_at_each_budget_are_compared_audited_and_drawn(tmp_path: Path) -> None:
    with serving(Server()) as (address, got):
        told = document(tune(address, tmp_path, "--budgets", "50,10", "--json"))
    rows = {(row["method"], row["budget"]): row for row in told["rows"]}
    assert rows.keys() == {(method, budget) for method in ("promprune", "random") for budget in ("50", "10")}
    row = rows["promprune", "50"]
    assert row["cells"][0]["unchanged"]["value"] == pytest.approx(1 / 3)
    assert row["first"] == pytest.approx(1 / 3)
    assert row["nats"] == pytest.approx(2 * 2 / 3)
    assert row["cells"][0]["share"] == pytest.approx(200 / 800)
    assert (told["full"]["value"], row["difference"]["value"]) == (0.5, -0.0)  # "Yes." is not what was said
    again = {cell["threshold"]: cell for cell in row["cells"]}
    assert list(again) == list(THRESHOLDS)
    assert again[0.7]["unchanged"]["value"] == 1
    assert again[0.7]["again"] == pytest.approx(2 / 3)
    assert again[0.7]["tokens"] == pytest.approx((200 + 600) / 3)
    audits = [body for body in got if "prompt_logprobs" in body]
    assert len(audits) == 2 * 2 * 2
    for body in audits:
        assert body["messages"][-1] == {"role": "assistant", "content": " no"}
        assert (body["visual_token_budget"], body["max_tokens"]) == ("full", 1)
        assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    html = (tmp_path / "out" / PAGE).read_text()
    assert html.count("<article>") == 2
    assert html.count("tokens kept</figcaption>") == 3
    assert any("down-sampling is not possible here" in note for note in told["notes"])
    assert any("random" in note for note in html.split("<li>"))


def test_a_run_resumes_where_it_stopped_and_refuses_other_questions(tmp_path: Path) -> None:
    respond, count = Server(), 0

    def breaking(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        nonlocal count
        count += "messages" in body
        return respond(body) if count <= 6 else (400, {"error": {"message": "enough"}})

    with server(breaking, state=TUNED_STATE) as (address, _):
        stopped = tune(address, tmp_path, "--concurrency", 1)
    assert stopped.exit_code == 2
    assert "answered question 'first' with" in stopped.stderr
    kept = len(read(tmp_path / "out" / FILE).said)
    assert kept == 6
    with serving(respond) as (address, got):
        done = tune(address, tmp_path)
        assert done.exit_code == 0, done.output
        assert sum("logprobs" in body for body in got) == 3 * 9 - kept
        before = len(got)
        assert tune(address, tmp_path, "--report-only").exit_code == 0
        assert len(got) == before
        other = tune(address, tmp_path, lines=LINES[:2])
        assert "questions was" in other.stderr
        assert "answers to other questions" in tune(address, tmp_path, "--report-only", lines=LINES[:2]).stderr
        assert "answer_tokens was 64, is now 5" in tune(address, tmp_path, "--answer-tokens", 5).stderr
    assert "promprune serve MODEL" in done.stdout


def test_smaller_images_have_no_more_tokens_than_a_budget(tmp_path: Path) -> None:
    respond = Server(any_size=True)
    with serving(respond) as (address, _):
        told = document(tune(address, tmp_path, "--budgets", "50,10", "--json"))
    rows = [row for row in told["rows"] if row["method"] == "downsample"]
    assert [row["budget"] for row in rows] == ["50", "10"]
    smaller = [each for each in read(tmp_path / "out" / FILE).said.values() if each.method == "downsample"]
    for each in smaller:
        images = 2 if each.question == "2" else 1
        assert int(each.budget) * images * 0.7 < each.kept <= int(each.budget) * images
    assert len({size for size in respond.sizes if size != (80, 40)}) == 2
    assert not any("down-sampling" in note for note in told["notes"])


def test_where_no_smaller_image_is_small_enough_that_is_said(tmp_path: Path) -> None:
    class Floored(Server):
        def tokens(self, width: int, height: int) -> int:
            return max(40, super().tokens(width, height))

    with serving(Floored(any_size=True)) as (address, _):
        told = document(tune(address, tmp_path, "--budgets", "50,10", "--json"))
    assert [row["budget"] for row in told["rows"] if row["method"] == "downsample"] == ["50"]
    (note,) = told["notes"]
    assert note.startswith("'downsample' was left out at budget 10. No smaller image has 10 tokens or fewer here")
    assert note.endswith("--visual-token-allow-methods downsample.")


def test_where_no_smaller_image_is_small_enough_the_server_takes_means(tmp_path: Path) -> None:
    class Floored(Server):
        def tokens(self, width: int, height: int) -> int:
            return max(40, super().tokens(width, height))

    allowed: list[Any] = [{"name": name, "options": {}} for name in ("promprune", "random", "downsample")]
    with serving(Floored(any_size=True), allowed_methods=allowed) as (address, got):
        told = document(tune(address, tmp_path, "--budgets", "50,10", "--json"))
    assert [row["budget"] for row in told["rows"] if row["method"] == "downsample"] == ["50", "10"]
    asked = [each["visual_token_budget"] for each in got if each.get("visual_token_method") == "downsample"]
    assert {*asked} == {10}
    (note,) = told["notes"]
    assert note.startswith("At budget 10, 'downsample' is the server's method, means of tokens. No smaller image")


@pytest.mark.parametrize("number", [3, 40])
def test_answers_that_are_empty_with_all_tokens_are_no_unchanged_ones(tmp_path: Path, number: int) -> None:
    lines = [{"image": "red.png", "question": "?"}] * number
    with serving(Server(thinks=True)) as (address, got):
        words = ("--answer-tokens", 7, "--concurrency", 1)
        results = [tune(address, tmp_path, *words, *more, lines=lines) for more in ((), ("--report-only",))]
    for result in results:
        assert result.exit_code == 2
        told = " ".join(result.stderr.split())
        assert "answers with all tokens are empty, so there is nothing to compare." in told
        assert "all 7 tokens on that: set a larger --answer-tokens, or turn thinking off" in told
    assert len(got) <= 9 * 8, "it stops early"


def test_answers_that_were_cut_off_are_told(tmp_path: Path) -> None:
    with serving(Server(thinks=True)) as (address, _):
        told = document(tune(address, tmp_path, "--budgets", "50", "--json"))
        shown = tune(address, tmp_path, "--budgets", "50", "--report-only")
    assert told["cut_off"] == pytest.approx(1 / 3)
    html = (tmp_path / "out" / PAGE).read_text()
    for where in (" ".join(shown.stdout.split()), html):
        assert "33.3% of the answers were cut off at 64 tokens (--answer-tokens)" in where
        assert "1 of 3 answers with all tokens are empty." in where


def test_all_tokens_asked_again_are_a_row_and_never_recommended(tmp_path: Path) -> None:
    with serving(Server()) as (address, got):
        told = document(tune(address, tmp_path, "--budgets", "100%", "--goal", "1%", "--json"))
    assert [(row["budget"], row["cells"][0]["unchanged"]["value"]) for row in told["rows"]] == [("100%", 1)] * 2
    assert told["recommendation"] is told["best"] is None
    assert sum(body["visual_token_budget"] == "100%" for body in got) == 2 * len(LINES)


def test_other_limits_of_the_server_are_refused(tmp_path: Path) -> None:
    for maximum in (None, 100):
        limits = {**TUNED_STATE["limits"], "max": maximum}
        with serving(Server(), limits=limits) as (address, _):
            result = tune(address, tmp_path, "--budgets", "50")
    assert result.exit_code == 2
    assert "limits was" in result.stderr


def test_an_address_that_fails_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fails(url: str) -> bytes:
        asked.append(url)
        raise httpx.ConnectTimeout("no answer")

    monkeypatch.setattr(read_questions, "_fetched", fails)
    lines = [{"image": "http://host.invalid/a.png", "question": "?"}] * 3
    with pytest.raises(EvaluationError, match="has 3 faulty lines") as error:
        load(file_of(tmp_path, lines), tmp_path / "images")
    assert str(error.value).count("cannot be fetched (no answer)") == 3
    assert len(asked) == 1


def test_a_server_may_down_sample_itself(tmp_path: Path) -> None:
    allowed = [{"name": name, "options": {}} for name in ("promprune", "downsample")]
    with serving(Server(), allowed_methods=allowed) as (address, got):
        told = document(tune(address, tmp_path, "--budgets", "50", "--json"))
    assert {body.get("visual_token_method") for body in got if "logprobs" in body} == {
        None,
        "promprune",
        "downsample",
    }
    (note,) = told["notes"]
    assert "--visual-token-allow-methods downsample,random" in note


def test_what_a_server_cannot_do_is_said_and_the_rest_is_done(tmp_path: Path) -> None:
    refusing = Server(audits=False, inspector=False)
    with serving(refusing, escalation={"reason": "it has no log-probabilities"}) as (address, _):
        told = document(tune(address, tmp_path, "--budgets", "50", "--json"))
    (row,) = [row for row in told["rows"] if row["method"] == "promprune"]
    assert (row["first"], row["nats"], len(row["cells"])) == (None, None, 1)
    notes = " ".join(told["notes"])
    assert "were not audited. The server refused that: status 400: no log-probabilities of prompts here" in notes
    assert "never answers again: it has no log-probabilities" in notes
    assert "The kept tokens of images are not drawn" in notes
    html = (tmp_path / "out" / PAGE).read_text()
    assert html.count("<figure><img") == 3
    assert "tokens kept</figcaption>" not in html
    assert "The kept tokens of images are not drawn" in html


def advised(changed: int, number: int, goal: float, **more: Callable[[int], Said]) -> tuple[str, str, list[str]]:
    asked = questions(range(number))
    answers = [said(each.id, "full", "full", "yes") for each in asked]
    answers += [said(str(n), "promprune", "25", "no" if n < changed else "yes") for n in range(number)]
    answers += [make(n) for make in more.values() for n in range(number)]
    summary = summarize(records(answers), asked, goal)
    return text.recommendation(summary), text.options(summary), text.reservations(summary)


def test_what_is_recommended() -> None:
    told, options, notes = advised(0, 500, 0.95, control=lambda n: said(str(n), "random", "25", "no"))
    assert told == "Budget 25, never ask again: 100% (98.8 to 100) of the answers unchanged at 0.25 of the tokens."
    assert options == "promprune serve MODEL --visual-token-budget 25"
    assert len(notes) == 1
    told, options, _ = advised(
        *(300, 500, 0.95),
        other=lambda n: said(str(n), "divprune", "50", "no" if n < 25 else "yes", 0.85 if n < 100 else 1),
    )
    assert told.startswith("Method divprune, budget 50, ask again below 0.9: 100% (98.")
    assert told.endswith("unchanged at 0.70 of the tokens.")
    flags = ("--visual-token-method divprune", "--visual-token-budget 50", "--visual-token-escalate 0.9")
    assert options == " ".join(["promprune serve MODEL", *flags])


def test_all_tokens_are_recommended_if_nothing_else_was_shown() -> None:
    told, options, _ = advised(0, 100, 0.99)
    assert told.startswith("Keep all tokens: no budget was shown to leave 99% of the answers unchanged.")
    assert "100 questions cannot show 99%: that takes 586 with no changed answer." in told
    assert options == "promprune serve MODEL"
    told, _, _ = advised(300, 1000, 0.99)
    assert told.endswith("Ask more questions, try larger budgets, or set a lower --goal.")


def test_a_control_that_does_as_well_is_pointed_at() -> None:
    *_, notes = advised(4, 300, 0.9, control=lambda n: said(str(n), "random", "25", "no" if n < 5 else "yes"))
    assert "Look at 'random': at budget 25, 'promprune' leaves only +0.3 ± 0.3 points more answers" in notes[1]


def test_a_maximum_of_the_server_is_pointed_at() -> None:
    asked = questions(range(2))
    full = [replace(said(each.id, "full", "full", "yes"), kept=50) for each in asked]
    told = text.reservations(summarize(records(full), asked, 0.9))
    assert "left out tokens of 2 of 2 answers" in told[1]


def test_the_page_shows_what_was_said_as_text(tmp_path: Path) -> None:
    asked = load(file_of(tmp_path, [{"image": "red.png", "question": "<script>alert(1)</script>"}]), tmp_path)
    answers = [said("1", "full", "full", "<b>"), said("1", "promprune", "25", "</dd><script>")]
    html = page(summarize(records(answers), asked, 0.9), asked, tmp_path)
    assert "<script" not in html
    assert "&lt;/dd&gt;&lt;script&gt; (confidence 1)" in html
    assert "http" not in html.replace("http-equiv", "")


def test_few_of_many_changed_answers_are_shown(tmp_path: Path) -> None:
    lines = [{"image": [url(png(number))] * 6, "question": "?", "id": f"q{number}"} for number in range(60)]
    asked = load(file_of(tmp_path, lines), tmp_path)
    answers = [said(each.id, "full", "full", "yes") for each in asked]
    for number, each in enumerate(asked):  # 10 that are asked again, 20 that are not, 30 that did not change
        confidence = 0.4 if number < 10 else 1.0
        answers.append(said(each.id, "promprune", "25", "no" if number < 30 else "yes", confidence))
    html = page(summarize(records(answers), asked, 0.4), asked, tmp_path)
    assert "ask again below 0.5" in html
    assert html.count("<article>") == 24
    assert html.count("2 more images are not shown.") == 24
    assert html.count(", asked again)") == 4
    assert html.index("(q29)") < html.index(", asked again)"), "first those that stay changed"


def test_demo_questions_take_turns_and_are_written_once(tmp_path: Path) -> None:
    words = ["tune", "--demo-questions", "16", "--out", str(tmp_path / "mine")]
    assert "promprune tune --questions" in CliRunner().invoke(app, words).stderr.replace("\n", " ")
    asked = load(tmp_path / "mine" / demo_questions.FILE, tmp_path)
    tasks = [each.id.partition("-")[2] for each in asked]
    assert set(tasks[:6]) == set(TASKS[:6])
    assert set(tasks[6::7]) <= set(TASKS[6:])
    assert {each.sizes for each in asked} == {((336, 336),)}
    assert len({each.cluster for each in asked}) == 16
    with Image.open(asked[0].images[0]) as image:
        assert image.format == "PNG"
    assert "is there already" in CliRunner().invoke(app, words).stderr


def test_answers_of_another_command_are_refused(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_text('{"format": 1, "settings": {}}\n{"run": {}}\n{"kind": "scattered"}\n')
    with pytest.raises(EvaluationError, match="lines of another command"):
        read(file)
    assert Records().said == {}
