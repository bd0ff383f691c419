"""`promprune tune` against a real server, and its page in a real browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from promprune_vllm.demo.server import Server
from promprune_vllm.evaluation.records import FILE
from promprune_vllm.evaluation.report import CONTROLS
from promprune_vllm.tuning import demo_questions
from promprune_vllm.tuning.records import Records, read
from promprune_vllm.tuning.run import OVERLAYS, PAGE
from promprune_vllm.tuning.summary import THRESHOLDS
from tests.conftest import VISUAL_TOKENS
from tests.server.browser import ARTEFACTS, chromium

pytestmark = [pytest.mark.server, pytest.mark.release]
QUESTIONS = 20
BUDGETS = (64, 16)


def tune(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "promprune_vllm", "tune", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
        env=os.environ,
    )


def document(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class Tuned:
    """A run on a few questions of the demo, with its folder and how to run it again."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.out = folder / "out"
        file = demo_questions.write(folder, QUESTIONS)
        budgets = ",".join(map(str, BUDGETS))
        self.arguments = ("--questions", file, "--out", self.out, "--budgets", budgets, "--json", "--goal", "60%")
        self.server = server
        self.document = document(self.again())

    def again(self, *more: object) -> subprocess.CompletedProcess[str]:
        return tune("--url", self.server.url, *self.arguments, *more)

    @property
    def records(self) -> Records:
        return read(self.out / FILE)


@pytest.fixture(scope="module")
def tuned(every_method: Server, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(every_method, tmp_path_factory.mktemp("tune"))


def test_each_question_is_asked_with_all_tokens_and_at_each_budget(tuned: Tuned) -> None:
    rows = {(row["method"], row["budget"]): row for row in tuned.document["rows"]}
    assert {("promprune", "64"), ("promprune", "16"), ("random", "64"), ("random", "16")} <= rows.keys()
    assert all(row["questions"] == QUESTIONS for row in rows.values())
    assert len(tuned.records.said) == QUESTIONS * (1 + len(rows))
    for said in tuned.records.said.values():
        kept = VISUAL_TOKENS if said.method == "full" else int(said.budget)
        assert (said.seen, said.kept) == (VISUAL_TOKENS, kept)
    assert ("downsample", "64") in rows, "this server has the method, and its tower a fixed number of tokens"
    assert tuned.document["notes"] == []
    curve = rows["promprune", "16"]["cells"]
    assert [cell["threshold"] for cell in curve] == list(THRESHOLDS)
    agreed = [cell["unchanged"]["value"] for cell in curve]
    assert agreed == sorted(agreed), "asking again only mends"
    assert (
        rows["promprune", "64"]["cells"][0]["unchanged"]["value"]
        > rows["random", "16"]["cells"][0]["unchanged"]["value"]
    )
    chosen = tuned.document["recommendation"]
    assert chosen["method"] not in CONTROLS
    assert chosen["unchanged"]["low"] >= 0.6
    assert chosen["share"] < 1


def test_changed_answers_are_audited(tuned: Tuned) -> None:
    records = tuned.records
    changed = {
        key for key, said in records.said.items() if not said.same_as(records.said[said.question, "full", "full"])
    }
    assert records.audits.keys() == changed
    for key, audit in records.audits.items():
        assert audit.tokens == records.said[key].tokens
        assert (audit.first == audit.tokens) == (audit.nats == 0), "what is likeliest loses nothing"
    assert any(audit.nats > 0.5 for audit in records.audits.values())
    firsts = [row["first"] for row in tuned.document["rows"]]
    assert all(0 < first < 1 or not row["nats"] for first, row in zip(firsts, tuned.document["rows"], strict=True))


def test_a_finished_run_asks_nothing_more(tuned: Tuned) -> None:
    seen = "promprune_visual_tokens_seen_total"
    before = tuned.server.metrics("promprune")[seen]
    again = tuned.again()
    assert f"{len(tuned.records.said)} of them answered before" in again.stderr
    told, only = document(again), document(tuned.again("--report-only", "--url", "http://127.0.0.1:1"))
    assert told["rows"] == only["rows"] == tuned.document["rows"]
    assert tuned.server.metrics("promprune")[seen] == before
    refused = tuned.again("--answer-tokens", "3")
    assert refused.returncode == 2
    assert "answers with other settings: answer_tokens was 64, is now 3" in refused.stderr.replace("\n", " ")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_opens_from_disk_and_everybody_can_use_it(tuned: Tuned, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with chromium() as browser:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tuned.out / PAGE).as_uri())
        shown = page.locator("article").count()
        assert page.locator("article img").count() == 2 * shown > 0
        assert len(list((tuned.out / OVERLAYS).iterdir())) == shown
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
        assert "of the answers unchanged" in page.locator(".advice .first").inner_text()
        assert "--visual-token-budget" in page.locator(".advice pre").inner_text()
        assert page.locator("svg polyline").count() == len(BUDGETS)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "wide"
        assert not page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=ARTEFACTS / f"tune-{width}.png", full_page=True)
        results = Axe().run(page)
        assert not results.violations_count, results.generate_report()
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == said == []
        context.close()


def test_the_terminal_ends_with_one_recommendation(tuned: Tuned) -> None:
    arguments = [word for word in tuned.arguments if word != "--json"]
    result = tune("--report-only", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("promprune serve MODEL --visual-token-budget") == 1
    assert result.stdout.count("of the answers unchanged at") == 1


@pytest.mark.timeout(3600)
def test_the_interval_of_a_recommendation_holds_on_other_questions(every_method: Server, tmp_path: Path) -> None:
    """Both measured: what is recommended on 200 questions, and how many of 200 others it leaves unchanged."""
    first, other = (demo_questions.write(tmp_path / str(seed), 200, seed) for seed in (0, 10_000))
    url = ("--url", every_method.url, "--json", "--concurrency", 8)
    told = document(tune(*url, "--questions", first, "--out", tmp_path / "first"))
    chosen = told["recommendation"]
    assert chosen is not None, told["best"]
    assert chosen["unchanged"]["low"] >= told["goal"] == 0.95
    assert chosen["share"] < 0.5
    budget = ("--budgets", chosen["budget"], "--methods", "promprune")
    again = document(tune(*url, *budget, "--questions", other, "--out", tmp_path / "other"))
    (row,) = again["rows"]
    (cell,) = [cell for cell in row["cells"] if cell["threshold"] == chosen["threshold"]]
    print(json.dumps({"recommended": chosen, "on others": cell}, indent=2))
    assert chosen["unchanged"]["low"] <= cell["unchanged"]["value"] <= chosen["unchanged"]["high"]
