"""A real Prometheus watches a real server under the demo's traffic: panels show something, sums are right."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from promprune_vllm import cli
from promprune_vllm.demo import run
from promprune_vllm.demo.sender import Report, Traffic, send
from promprune_vllm.demo.server import Server, free_port
from promprune_vllm.demo.traffic import REFUSED
from promprune_vllm.metrics.catalog import CATALOG, DISCARDED, FORMS, OUTCOMES, PART_OFF, STAGES
from tests.deploy.watching import DASHBOARDS, RULES, dashboard, names, recorded, targets, tool, vllms_series

pytestmark = [pytest.mark.server, pytest.mark.release]
TRAFFIC = Traffic(seconds=20, concurrency=4, seed=0)
_STEP_SECONDS = 2
_EMPTY_IF_WELL = {"Parts that are off": PART_OFF}
"""Panels that list what is wrong, and the metric they read: it is 0 on a server where nothing is."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A server that had traffic, and the Prometheus that saw it."""

    server: Server
    prometheus: str
    report: Report
    counted: Mapping[str, float]
    """What the server's counters stood at behind that traffic."""
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
        yield from _watch(tmp_path_factory.mktemp("watched"))


def _watch(directory: Path) -> Iterator[Watched]:
    tool("prometheus")  # before the server is started in vain
    with (
        run._demo_server(Console(stderr=True), 0, TRAFFIC) as server,
        _prometheus(directory, server.url) as prometheus,
    ):
        started = time.time()
        report = send(server.url, TRAFFIC)
        time.sleep(3)  # two more scrapes
        yield Watched(server, prometheus, report, server.metrics("promprune"), started)


@contextmanager
def _prometheus(directory: Path, url: str) -> Iterator[str]:
    """Run Prometheus with our rules, and yield its address once it has read the server's metrics."""
    targets_of = [{"targets": [url.removeprefix("http://")]}]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in RULES],
        "scrape_configs": [{"job_name": "promprune", "static_configs": targets_of}],
    }
    file, address = directory / "prometheus.yml", f"127.0.0.1:{free_port()}"
    file.write_text(yaml.safe_dump(config))
    options = [f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [tool("prometheus"), *options, f"--web.listen-address={address}"], stdout=log, stderr=log
        )
    try:
        _wait_for_a_scrape(f"http://{address}", process, directory / "prometheus.log")
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def _wait_for_a_scrape(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        assert process.poll() is None, log.read_text()
        try:
            found = httpx.get(f"{url}/api/v1/query", params={"query": "up == 1"}, timeout=5).json()
            if found["data"]["result"]:
                return
        except (httpx.TransportError, ValueError):
            pass
        time.sleep(0.5)
    pytest.fail(f"Prometheus has read nothing within a minute:\n{log.read_text()}")


def _variables(watched: Watched, uid: str) -> dict[str, str]:
    """Return what Grafana would put in the place of each variable, everything being chosen."""
    (document,) = [each for each in map(dashboard, DASHBOARDS) if each["uid"] == uid]
    values = {"$__range": f"{math.ceil(time.time() - watched.started) + 2}s"}
    for variable in document["templating"]["list"]:
        name = f"${variable['name']}"
        if variable["type"] == "interval":
            values[name] = variable["current"]["value"]
        elif variable["type"] == "query":
            known = _label_values(watched, variable["query"]["query"], values)
            values[name] = variable.get("allValue") or f"({'|'.join(known)})"
    return values


def _label_values(watched: Watched, query: str, values: dict[str, str]) -> list[str]:
    selector, _, label = query.removeprefix("label_values(").removesuffix(")").rpartition(", ")
    found: list[str] = watched.api(f"label/{label}/values", **{"match[]": _filled(selector, values)})
    assert found, f"the variable {query} has nothing to choose from"
    return found


def _filled(expression: str, values: dict[str, str]) -> str:
    for name in sorted(values, key=len, reverse=True):
        expression = expression.replace(name, values[name])
    assert "$" not in expression
    return expression


def test_every_query_of_every_panel_returns_numbers(watched: Watched) -> None:
    variables = {uid: _variables(watched, uid) for uid in {uid for uid, _, _ in targets()}}
    empty = []
    for uid, panel, target in targets():
        expression = _filled(target["expr"], variables[uid])
        if target["instant"]:
            samples = [series["value"] for series in watched.now(expression)]
        else:
            samples = [sample for series in watched.over_time(expression) for sample in series["values"]]
        if not any(math.isfinite(float(value)) for _, value in samples) and panel["title"] not in _EMPTY_IF_WELL:
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
    assert _label_values(watched, "label_values(promprune_build_info, model_name)", {}) == ["demo"]


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
    for metric in set(CATALOG) - set(_EMPTY_IF_WELL.values()):
        name = metric.name + ("_count" if metric.kind == "histogram" else "")
        assert watched.now(f"sum({name}) > 0"), f"{metric.name} is zero after the traffic"


def test_the_summary_and_the_counters_tell_the_same(watched: Watched) -> None:
    every = watched.report.total
    counted = watched.counted
    assert every.requests >= 20
    assert (every.failed, every.aborted > 0) == (0, True)
    assert counted["promprune_visual_tokens_seen_total"] == every.seen
    assert counted["promprune_visual_tokens_kept_total"] == every.kept
    assert counted["promprune_visual_tokens_saved_total"] == every.saved > 0
    assert counted["promprune_refused_requests_total"] == every.refused
    assert counted["promprune_requests_total"] == every.requests
    (again,) = watched.now('promprune_escalations_total{decision="asked_again"}')
    # A client that hangs up after its answer was asked for again has no reply that tells.
    assert 0 < every.asked_again <= float(again["value"][1]) <= every.asked_again + every.aborted
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
