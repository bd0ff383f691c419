"""`promprune bench serving` against a real server, with a handful of requests."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from promprune_vllm.demo.server import Server

pytestmark = pytest.mark.server


def test_a_tiny_sweep_has_every_field(server: Server) -> None:
    options = ("--url", server.url, "--budget", "full", "--budget", "64", "--concurrency", "2")
    sizes = ("--requests", "4", "--output-tokens", "4", "--image-px", "64", "--json")
    result = subprocess.run(
        [sys.executable, "-m", "promprune_vllm", "bench", "serving", *options, *sizes],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
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
    assert {"machine", "cores", "versions", "command"} <= set(document["provenance"])
