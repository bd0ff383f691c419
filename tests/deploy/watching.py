"""What the tests of dashboards and rules share: where they lie, the metrics they name, and a real Prometheus."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from promprune_vllm.demo.server import free_port
from promprune_vllm.metrics.catalog import CATALOG
from tests.deploy.docker_engine import environment

ROOT = Path(__file__).parents[2]
GRAFANA, PROMETHEUS = ROOT / "deploy" / "grafana", ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def tool(name: str) -> str:
    """Return the path of one of Prometheus' programs, or skip the test."""
    found = shutil.which(name, path=environment()["PATH"])
    if found is None:
        pytest.skip(f"{name} is not on this machine (`make tools` fetches it on Debian)")
    return found


def dashboard(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def panels(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that show something."""
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def targets() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield every query of every dashboard, with the dashboard's uid and the panel."""
    for path in DASHBOARDS:
        document = dashboard(path)
        for panel in panels(document):
            for target in panel["targets"]:
                yield document["uid"], panel, target


def rules() -> list[dict[str, Any]]:
    return [
        rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
    ]


def recorded() -> set[str]:
    """Return the names that recording rules give."""
    return {rule["record"] for rule in rules() if "record" in rule}


def names(expression: str) -> set[str]:
    """Return the names of metrics, ours and vLLM's, and of recorded series."""
    without_labels = re.sub(r"\{[^}]*\}", "", expression)
    found = {name for name in _NAME.findall(without_labels) if not name.startswith(":")}
    return {name for name in found if ":" in name or name.startswith("promprune_")}


def our_series() -> dict[str, str]:
    """Return the name of every series we expose, and its entry in the catalogue."""
    return {
        metric.name.removesuffix("_total") + suffix: metric.name
        for metric in CATALOG
        for suffix in _SUFFIXES[metric.kind]
    }


@lru_cache
def vllms_series() -> set[str]:
    """Return the names vLLM exposes, read from the code that makes them: importing it takes half a minute."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = Path(spec.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py"
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_cls"):
            kind = node.func.attr.strip("_").removesuffix("_cls")
            name = {word.arg: word.value for word in node.keywords}.get("name")
            if kind in _SUFFIXES and isinstance(name, ast.Constant):
                base = str(name.value).removesuffix("_total") if kind == "counter" else str(name.value)
                found |= {base + suffix for suffix in _SUFFIXES[kind]}
    return found


@contextmanager
def prometheus(directory: Path, url: str) -> Iterator[str]:
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
