"""The dashboards as they are committed: made by their generator, of metrics that exist, in Grafana's own form."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from promprune_vllm.engine import keys
from promprune_vllm.metrics.catalog import CATALOG
from promprune_vllm.metrics.metric import LABELS
from tests.deploy.watching import (
    DASHBOARDS,
    GRAFANA,
    ROOT,
    dashboard,
    names,
    our_series,
    panels,
    recorded,
    rules,
    targets,
    vllms_series,
)
from tests.documents import text

TARGETS = list(targets())
TARGET_IDS = [f"{uid}: {panel['title']} {target['refId']}" for uid, panel, target in TARGETS]
every_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
every_target = pytest.mark.parametrize(("uid", "panel", "target"), TARGETS, ids=TARGET_IDS)
_SCHEMA = Path(__file__).parent / "grafana_schema"


def test_what_is_committed_is_what_the_generator_writes() -> None:
    code = "import json, build_dashboards; print(json.dumps(build_dashboards.documents()))"
    made = subprocess.run([sys.executable, "-c", code], cwd=GRAFANA, capture_output=True, text=True, check=True)
    assert {path.name: path.read_text() for path in DASHBOARDS} == json.loads(made.stdout), (
        "run `python deploy/grafana/build_dashboards.py`"
    )


def test_every_metric_on_a_dashboard_in_a_rule_or_in_the_documents_exists() -> None:
    known = our_series().keys() | vllms_series() | recorded()
    for uid, panel, target in TARGETS:
        assert names(target["expr"]) <= known, f"{uid}: {panel['title']}"
    for rule in rules():
        assert names(rule["expr"]) <= known, rule
    written = set(re.findall(r"\bpromprune_(?!vllm\b)[a-z_]+[a-z]", text()))
    assert written, "the documents name no metric"
    others = {keys.CALIBRATION, keys.TRACES_METHOD, keys.CACHE_SIZE_METHOD}
    assert written <= our_series().keys() | {metric.name for metric in CATALOG} | others


def test_every_metric_of_the_catalogue_is_on_a_dashboard() -> None:
    shown = {
        our_series()[name] for _, _, target in TARGETS for name in names(target["expr"]) if name in our_series()
    }
    assert shown == {metric.name for metric in CATALOG}


@every_target
def test_labels_and_their_values_are_those_of_the_catalogue(
    uid: str, panel: dict[str, Any], target: dict[str, Any]
) -> None:
    metrics = {metric.name: metric for metric in CATALOG}
    for name, matchers in re.findall(r"(promprune_\w+)\{([^}]*)\}", target["expr"]):
        labels = metrics[our_series()[name]].labels
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
            assert label in labels, f"{name} has no label {label}"
            values = LABELS[label][1]
            assert not values or set(value.split("|")) <= set(values)
    for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
        assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), f"the legend's {label} is summed away"


@every_target
def test_counters_are_rates_and_quantiles_keep_their_buckets(
    uid: str, panel: dict[str, Any], target: dict[str, Any]
) -> None:
    expression = target["expr"]
    for name in names(expression):
        if name.endswith(("_total", "_bucket", "_sum", "_count")):
            uses = len(re.findall(rf"\b{name}\b", expression))
            grown = rf"(rate|increase)\({name}(\{{[^}}]*\}})?\[\$(interval|__range)\]\)"
            assert len(re.findall(grown, expression)) == uses, f"{name} without rate() or increase()"
    if "histogram_quantile" in expression:
        assert re.search(r"histogram_quantile\([\d.]+, sum by \(le(, \w+)*\) \(rate\(", expression)
    assert (panel["type"] == "heatmap") == (target["format"] == "heatmap")


@every_dashboard
def test_a_newcomer_finds_every_panel_explained(path: Path) -> None:
    document = dashboard(path)
    assert document["description"]
    for panel in panels(document):
        assert len(panel["description"]) > 40, panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["type"] == "table" or defaults["unit"], f"{panel['title']} has no unit"
        if panel["type"] == "timeseries":
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
            assert panel["options"]["legend"]["showLegend"]
    titles = [panel["title"] for panel in document["panels"]]
    assert len(set(titles)) == len(titles)


@every_dashboard
def test_panels_fill_the_grid_without_overlapping(path: Path) -> None:
    document = dashboard(path)
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & taken, panel["title"]
        taken |= own
    assert {x for x, _ in taken} == set(range(24))
    assert len(taken) == 24 * (max(y for _, y in taken) + 1), "there is a hole"
    identifiers = [panel["id"] for panel in document["panels"]]
    assert len(set(identifiers)) == len(identifiers)


@every_dashboard
def test_variables_are_those_that_queries_use(path: Path) -> None:
    document = dashboard(path)
    variables = {variable["name"]: variable for variable in document["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([document["panels"], list(variables.values())])))
    assert used - {"__range", "__all"} == set(variables)
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(document):
        assert all(each["datasource"] == source for each in (panel, *panel["targets"]))


def test_the_dashboards_lead_to_each_other() -> None:
    documents = [dashboard(path) for path in DASHBOARDS]
    for document in documents:
        (link,) = document["links"]
        (other,) = [each for each in documents if each is not document]
        assert (link["url"], link["title"]) == (f"/d/{other['uid']}", other["title"])
        assert link["includeVars"]
        assert link["keepTime"]


def test_grafana_is_told_where_prometheus_and_the_dashboards_are() -> None:
    folder = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["uid"]
    assert source["isDefault"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "promprune.yaml").read_text())["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")


def test_they_are_checked_for_the_grafana_that_the_compose_stack_starts() -> None:
    grafana = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["grafana"]
    checked = json.loads((_SCHEMA / "package.json").read_text())["dependencies"]["@grafana/schema"]
    assert grafana["image"] == f"grafana/grafana:{checked}"


@pytest.fixture(scope="module")
def grafanas_schema() -> dict[str, Any]:
    """The JSON schema of a dashboard, made from the types Grafana publishes; kept in build/ for the next time."""
    files = sorted(_SCHEMA.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    folder = ROOT / "build" / f"grafana-schema-{digest}"
    made = folder / "schema.json"
    if not made.is_file():
        if shutil.which("npm") is None:
            pytest.skip("there is no npm here, which brings Grafana's types")
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            shutil.copy(path, folder)
        _run("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", cwd=folder)
        options = ["--tsconfig", "tsconfig.json", "--no-type-check", "--expose", "none", "--type", "Dashboard"]
        _run(
            "node_modules/.bin/ts-json-schema-generator",
            *("--path", "dashboard.ts", *options, "--out", "unfinished.json"),
            cwd=folder,
        )
        (folder / "unfinished.json").replace(made)
    schema: dict[str, Any] = json.loads(made.read_text())["definitions"]["Dashboard"]
    return schema


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        said = f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}"
        if command[0] == "npm" and not os.environ.get("CI"):
            pytest.skip(said)
        pytest.fail(said)


@every_dashboard
def test_dashboards_have_the_form_grafana_publishes(path: Path, grafanas_schema: dict[str, Any]) -> None:
    document = dashboard(path)
    assert _violations(grafanas_schema, document) == []
    # The schema is closed: what Grafana does not know, or knows under another name, is found.
    panel = next(panel for panel in document["panels"] if panel["type"] == "timeseries")
    panel["fieldConfig"]["defaults"]["custom"]["lineWidht"] = 2
    document["titel"] = "?"
    assert len(_violations(grafanas_schema, document)) == 2


def _violations(schema: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """Return what is wrong; each panel is held against its own kind, for messages somebody can read."""
    parts = dict(schema["properties"])
    kinds = {kind["properties"]["type"]["const"]: kind for kind in parts.pop("panels")["items"]["anyOf"]}
    frame = {key: value for key, value in document.items() if key != "panels"}
    required = [name for name in schema["required"] if name != "panels"]
    found = list(_errors({**schema, "properties": parts, "required": required}, frame, "dashboard"))
    for panel in document["panels"]:
        found += _errors(kinds[panel["type"]], panel, panel["title"])
    return found


def _errors(schema: dict[str, Any], instance: dict[str, Any], where: str) -> list[str]:
    checker = jsonschema.Draft7Validator(schema)
    return [f"{where}, {list(error.absolute_path)}: {error.message}" for error in checker.iter_errors(instance)]
