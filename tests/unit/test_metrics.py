"""The catalogue's form, and the recorder's files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector

from promprune_vllm.metrics import recorder as module
from promprune_vllm.metrics.catalog import CATALOG, OUTCOMES
from promprune_vllm.metrics.recorder import Recorder


@pytest.mark.parametrize("metric", CATALOG, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: object) -> None:
    name = metric.name  # type: ignore[attr-defined]
    assert name.startswith("promprune_")
    assert ":" not in name
    assert name.endswith("_total") == (metric.kind == "counter")  # type: ignore[attr-defined]
    assert metric.help.endswith(".")  # type: ignore[attr-defined]
    assert list(metric.buckets) == sorted(metric.buckets)  # type: ignore[attr-defined]


def _samples(directory: Path) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    return {
        (sample.name, sample.labels.get("outcome", "")): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_everything_is_there_at_zero_and_counts(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path))
    assert {_samples(tmp_path)["promprune_requests_total", outcome] for outcome in OUTCOMES} == {0}
    recorder.prompt(576, 64)
    recorder.prompt(576, 576)
    recorder.outcome("refused")
    recorder.selection(0.003)
    counted = _samples(tmp_path)
    assert counted["promprune_visual_tokens_seen_total", ""] == 1152
    assert counted["promprune_visual_tokens_kept_total", ""] == 640
    assert [counted["promprune_requests_total", outcome] for outcome in OUTCOMES] == [1, 1, 0, 1, 0]
    assert counted["promprune_selection_seconds_count", ""] == 1


def test_recording_leaves_prometheus_client_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    before = values.ValueClass
    Recorder(str(tmp_path))
    assert values.ValueClass is before
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


def test_vllms_directory_is_used_where_it_made_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "vllm"
    shared.mkdir()
    monkeypatch.setenv("PROMPRUNE_METRICS_DIR", str(tmp_path))
    monkeypatch.setenv("PROMPRUNE_METRICS_OWNER", str(os.getpid()))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(shared))
    module.recorder().outcome("full")
    assert _samples(shared)["promprune_requests_total", "full"] == 1
    assert not list(tmp_path.glob("*.db"))


SPAWNS = """
import multiprocessing, os
from promprune_vllm.metrics.recorder import prepare_directory

def show():
    prepare_directory()
    print(os.environ["PROMPRUNE_METRICS_DIR"], flush=True)

if __name__ == "__main__":
    show()
    show()
    worker = multiprocessing.get_context("spawn").Process(target=show)
    worker.start()
    worker.join()
"""


def test_a_server_shares_its_directory_with_its_workers_and_with_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "spawns.py").write_text(SPAWNS)
    inherited = {**os.environ, "PROMPRUNE_METRICS_DIR": str(tmp_path), "PROMPRUNE_METRICS_OWNER": "1"}
    run = [sys.executable, str(tmp_path / "spawns.py")]
    shown = subprocess.run(run, env=inherited, capture_output=True, text=True, check=True).stdout.split()
    assert len(shown) == 3
    assert len(set(shown)) == 1
    assert shown[0] != str(tmp_path)
    assert not Path(shown[0]).exists(), "the first process removes the directory when it ends"
