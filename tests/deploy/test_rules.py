"""Recording rules and alerts: Prometheus' own checks and their unit tests, and that every alert helps somebody."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.watching import PROMETHEUS, ROOT, RULES, recorded, rules, tool
from tests.documents import example

TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
ALERTS = [rule for rule in rules() if "alert" in rule]


def _promtool(*arguments: str | Path) -> str:
    command = [tool("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_are_in_order() -> None:
    shown = _promtool("check", "rules", *RULES)
    assert f"{len(recorded())} rules found" in shown
    assert f"{len(ALERTS)} rules found" in shown


def test_rules_do_what_their_tests_say() -> None:
    _promtool("test", "rules", *TESTS)


def test_kubernetes_gets_the_same_rules() -> None:
    """The command of the documents that makes a PrometheusRule of them, without what sends it to a cluster."""
    script, sent, rest = example("prometheus-rule").partition("| kubectl apply -f -")
    assert (sent != "", rest) == (True, "\n")
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    made = yaml.safe_load(done.stdout)
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    monitor = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "base" / "podmonitor.yaml").read_text())
    assert made["metadata"] == monitor["metadata"]
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    assert made["spec"] == {"groups": groups}


def test_prometheus_reads_the_rules_and_they_know_its_jobs() -> None:
    file = PROMETHEUS / "prometheus.yml"
    assert f"{len(RULES)} rule files found" in _promtool("check", "config", file)
    config = yaml.safe_load(file.read_text())
    jobs = [each["job_name"] for each in config["scrape_configs"]]
    assert [job for job in jobs if "vllm" in job or "promprune" in job], "the alerts know a server by its job"


def test_every_rule_is_tested_and_every_alert_also_for_being_quiet() -> None:
    tests = [test for path in TESTS for test in yaml.safe_load(path.read_text())["tests"]]
    expressions = " ".join(each["expr"] for test in tests for each in test.get("promql_expr_test", ()))
    direct = {name for name in recorded() if name in expressions}
    used = {name for name in recorded() if any(name in rule["expr"] for rule in ALERTS)}
    assert direct | used == recorded()
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    for rule in ALERTS:
        own = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]]
        assert set(own) == {True, False}, rule["alert"]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_seen_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("PromPrune"), "the dashboard counts alerts by this"
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    for text in ("summary", "description", "runbook"):
        assert rule["annotations"][text].strip()
    assert len(rule["annotations"]["runbook"]) > 100


def test_recorded_series_are_named_by_level_metric_and_operation() -> None:
    for name in recorded():
        assert re.fullmatch(r"model_name(_[a-z]+)?:promprune_[a-z_]+:[a-z0-9_]+", name)
