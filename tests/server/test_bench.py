"""`promprune bench serving` against a real server, with a handful of requests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from promprune_vllm.demo.server import Server

pytestmark = pytest.mark.server


def measure(*options: str) -> dict[str, Any]:
    sizes = ("--requests", "4", "--concurrency", "2", "--output-tokens", "4", "--image-px", "64", "--json")
    result = subprocess.run(
        [sys.executable, "-m", "promprune_vllm", "bench", "serving", *options, *sizes],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert {"machine", "cores", "versions", "command"} <= set(document["provenance"])
    return document


def test_a_tiny_sweep_has_every_field(server: Server) -> None:
    document = measure("--url", server.url, "--budget", "full", "--budget", "64")
    full, pruned = document["rows"]
    assert (full["budget"], pruned["budget"]) == ("full", 64)
    for row in (full, pruned):
        assert (row["completed"], row["failed"], row["concurrency"]) == (4, 0, 2)
        assert row["requests_per_second"] > 0
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert 0 <= row["kv_usage_mean"] <= row["kv_usage_max"] <= 1
        assert row["lowest_level"] == 1
    assert (full["kept_share"], pruned["kept_share"]) == (1, round(64 / 576, 4))
    assert set(full["ratios"].values()) == {1}


@pytest.mark.release  # of four runs and a server of its own
def test_auto_and_a_fixed_budget_take_turns_on_a_server_that_adapts() -> None:
    document = measure("--adaptive", "--rounds", "2")
    rows = document["rows"]
    assert [row["budget"] for row in rows] == ["full", "auto"] * 2
    assert {row["completed"] for row in rows} == {4}
    assert all(row["seconds_until_full_level"] >= 0 for row in rows)
    for i in (0, 2):
        gain = rows[i + 1]["requests_per_second"] / rows[i]["requests_per_second"]
        assert rows[i + 1]["ratios"]["requests_per_second"] == pytest.approx(gain, abs=1e-3)
    gains = [row["ratios"]["requests_per_second"] for row in rows[1::2]]
    assert document["ratios"]["requests_per_second"] == pytest.approx(sum(gains) / 2, abs=1e-3)
