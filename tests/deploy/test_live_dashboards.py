"""A real Prometheus watches a real server under the demo's traffic: panels show something, sums are right."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from deploy.draw_dashboards.queries import Prometheus, filled
from promprune_vllm import cli
from promprune_vllm.demo import run
from promprune_vllm.demo.sender import Report, Traffic, send
from promprune_vllm.demo.server import Server
from promprune_vllm.demo.traffic import REFUSED
from promprune_vllm.metrics.catalog import CATALOG, PART_OFF, TARGET_PROOF, TARGET_TRIALS
from promprune_vllm.metrics.metric import DISCARDED, FORMS, OUTCOMES, STAGES
from tests.deploy.watching import (
    DASHBOARDS,
    dashboard,
    names,
    prometheus,
    recorded,
    targets,
    tool,
    vllms_series,
)
from tests.server.conftest import Series, series

pytestmark = [pytest.mark.server, pytest.mark.release]
TRAFFIC = Traffic(seconds=20, concurrency=4, seed=0)
_STEP_SECONDS = 2
_EMPTY_IF_WELL = {"Parts that are off": PART_OFF}
"""Panels that list what is wrong, and the metric they read: it is 0 on a server where nothing is."""
_WITHOUT_A_TARGET = {"Trials that agree": TARGET_TRIALS}
"""Panels that are empty without --visual-token-target, and the metric they read."""
_EMPTY = _EMPTY_IF_WELL | _WITHOUT_A_TARGET


@dataclass(frozen=True, slots=True)
class Watched:
    """A server that had traffic, and the Prometheus that saw it."""

    server: Server
    prometheus: str
    report: Report
    counted: Series
    """What the server's counters stood at behind that traffic: tests in any order send more."""
    started: float

    def api(self, path: str, **query: str) -> Any:
        reply = httpx.get(f"{self.prometheus}/api/v1/{path}", params=query, timeout=30)
        document = reply.json()
        assert (reply.status_code, document["status"]) == (200, "success"), document
        return document["data"]

    def now(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api("query", query=expression)["result"]
        return found

    def over_time(self, expression: str) -> list[dict[str, Any]]:
        span = {"start": str(self.started), "end": str(time.time()), "step": str(_STEP_SECONDS)}
        found: list[dict[str, Any]] = self.api("query_range", query=expression, **span)["result"]
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPRUNE_FEATURE_CACHE_GB", "0.1")  # for its panels
        patch.setenv("PROMPRUNE_AUDIT", "100%")
        yield from _watch(tmp_path_factory.mktemp("watched"))


def _watch(directory: Path) -> Iterator[Watched]:
    tool("prometheus")  # before the server is started in vain
    with (
        run._demo_server(Console(stderr=True), 0, TRAFFIC) as server,
        prometheus(directory, server.url) as address,
    ):
        started = time.time()
        report = send(server.url, TRAFFIC)
        time.sleep(3)  # two more scrapes
        yield Watched(server, address, report, series(server), started)


def _variables(watched: Watched, uid: str) -> dict[str, str]:
    """Return what Grafana would put in the place of each variable, everything being chosen."""
    (document,) = [each for each in map(dashboard, DASHBOARDS) if each["uid"] == uid]
    return Prometheus(watched.prometheus, watched.started, time.time() + 2).variables(document)


def test_every_query_of_every_panel_returns_numbers(watched: Watched) -> None:
    variables = {uid: _variables(watched, uid) for uid in {uid for uid, _, _ in targets()}}
    empty = []
    for uid, panel, target in targets():
        expression = filled(target["expr"], variables[uid])
        if target["instant"]:
            samples = [series["value"] for series in watched.now(expression)]
        else:
            samples = [sample for series in watched.over_time(expression) for sample in series["values"]]
        if not any(math.isfinite(float(value)) for _, value in samples) and panel["title"] not in _EMPTY:
            empty.append(f"{uid}, {panel['title']}, {target['legendFormat']}: {expression}")
    assert not empty, "\n".join(empty)


def test_a_panel_of_what_is_wrong_is_empty_because_nothing_is(watched: Watched) -> None:
    for title, metric in _EMPTY_IF_WELL.items():
        (panel, target), *_ = [(panel, target) for _, panel, target in targets() if panel["title"] == title]
        assert names(target["expr"]) == {metric.name}
        assert panel["fieldConfig"]["defaults"]["noValue"] == "all parts run"
        assert {series["value"][1] for series in watched.now(metric.name)} == {"0"}


def test_variables_offer_the_model_and_its_methods(watched: Watched) -> None:
    variables = _variables(watched, "promprune-selection")
    assert variables["$model"] == ".*"
    assert "promprune" in variables["$method"].strip("()").split("|")
    assert watched.api("label/model_name/values", **{"match[]": "promprune_build_info"}) == ["demo"]


def test_the_traffic_moves_what_it_can_move(watched: Watched) -> None:
    def moved(metric: str, label: str) -> set[str]:
        return {each["metric"][label] for each in watched.now(f"sum by ({label}) ({metric}) > 0")}

    assert moved("promprune_requests_total", "outcome") == set(OUTCOMES) - {"failed"}
    assert moved("promprune_budgets_total", "form") == set(FORMS) - {"per_frame"}  # the model takes no videos
    assert moved("promprune_escalations_total", "decision") == {"sure", "asked_again"}
    assert moved("promprune_escalation_discarded_tokens_total", "tokens") == set(DISCARDED)
    assert moved("promprune_refused_requests_total", "reason") == {"invalid", "images", "method"}
    assert moved("promprune_images_total", "cached") == {"true", "false"}
    assert moved("promprune_images_total", "modality") == {"image"}
    assert moved("promprune_selection_seconds_count", "stage") == set(STAGES)
    assert {"promprune", "none", "random"} <= moved("promprune_visual_tokens_kept_total", "method")
    for metric in set(CATALOG) - {*_EMPTY.values(), TARGET_PROOF}:
        name = metric.name + ("_count" if metric.kind == "histogram" else "")
        assert watched.now(f"sum({name}) > 0"), f"{metric.name} is zero after the traffic"


def test_the_summary_and_the_counters_tell_the_same(watched: Watched) -> None:
    every = watched.report.total

    def counted(name: str, *labels: str) -> float:
        found = [value for key, value in watched.counted.items() if key[0] == name and {*labels} <= {*key[1:]}]
        return sum(found)

    assert every.requests >= 20
    assert (every.failed, every.aborted > 0) == (0, True)
    assert counted("promprune_visual_tokens_seen_total") == every.seen
    assert counted("promprune_visual_tokens_kept_total") == every.kept
    assert counted("promprune_visual_tokens_saved_total") == every.saved > 0
    assert counted("promprune_refused_requests_total") == every.refused
    assert counted("promprune_requests_total") == every.requests
    assert counted("promprune_escalations_total", "asked_again") == every.asked_again > 0
    assert {line.kind: line.refused for line in watched.report.rows if line.refused} == {REFUSED: every.refused}


def test_rules_evaluate_and_nobody_is_alarmed(watched: Watched) -> None:
    groups = watched.api("rules")["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
        assert rule.get("state") != "firing"
    for name in recorded():
        assert watched.now(name), f"{name} has nothing"


def test_vllms_names_are_on_the_server(watched: Watched) -> None:
    exposed = {sample.name for family in watched.server.families("vllm:") for sample in family.samples}
    used = {name for _, _, target in targets() for name in names(target["expr"]) if name.startswith("vllm:")}
    assert used
    assert used <= exposed
    assert used <= vllms_series()


def test_our_exposition_is_as_prometheus_wants_it(watched: Watched) -> None:
    text = httpx.get(f"{watched.server.url}/metrics", timeout=30).text
    ours = [line for line in text.splitlines() if "promprune_" in line.split("{")[0]]
    assert any(line.startswith("# HELP") for line in ours)
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input="\n".join(ours) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_traffic_may_go_to_a_server_that_runs(watched: Watched) -> None:
    arguments = [
        "demo",
        "--traffic",
        "2",
        "--url",
        f"{watched.server.url}/v1",
        "--seed",
        "7",
        "--concurrency",
        "2",
    ]
    shown = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.stdout)
    assert (document["model"], document["traffic"]["seed"]) == ("demo", 7)
    assert document["total"]["requests"] == sum(row["requests"] for row in document["rows"]) > 0
    table = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "120"})
    assert table.exit_code == 0
    assert "s of traffic to demo" in table.stdout
    assert "tokens seen" in table.stdout
