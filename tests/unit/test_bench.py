"""What the measurements say: ratios, documents, and the arguments vLLM's benchmark gets."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest

from promprune_vllm.bench import load as module
from promprune_vllm.bench import serving
from promprune_vllm.bench.load import Load, Result, arguments
from promprune_vllm.bench.processes import ProcessUsage, growth, measure_usage
from promprune_vllm.errors import BenchError

RESULT = Result("full", 4, 8, 0, 2.0, 4.0, 100.0, 200.0, 0.5, 0.9, 1.0, 1.0)


class Reply:
    text = "vllm:kv_cache_usage_perc 0.5\n"

    def raise_for_status(self) -> Reply:
        return self

    def json(self) -> Any:
        return {"data": [{"id": "demo", "root": "/models/demo"}]}


def test_ratios_are_to_the_first_budget() -> None:
    better = replace(RESULT, requests_per_second=6.0, ttft_p50_ms=50.0, kv_usage_mean=0.25)
    assert serving.ratios(better, RESULT) == {
        "requests_per_second": 1.5,
        "ttft_p50_ms": 0.5,
        "ttft_p99_ms": 1.0,
        "kv_usage_mean": 0.5,
    }


@pytest.mark.parametrize("budget", [None, 64, "25%"])
def test_the_benchmark_sends_the_budget_and_nothing_else(monkeypatch: pytest.MonkeyPatch, budget: object) -> None:
    monkeypatch.setattr(module.httpx, "get", lambda *_, **__: Reply())
    words = arguments("http://127.0.0.1:1", Load(4, 8), budget)
    sent = json.loads(words[words.index("--extra-body") + 1])
    assert sent == {"temperature": 0} | ({} if budget is None else {"visual_token_budget": budget})
    assert words[words.index("--model") + 1] == "/models/demo"


def test_a_server_without_the_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.httpx, "get", lambda *_, **__: Reply())
    with pytest.raises(BenchError, match="is the plugin installed there"):
        module.run("http://127.0.0.1:1", Load(1, 1), None)


def test_growth_is_told_of_what_is_held_after_warming_up() -> None:
    samples = [ProcessUsage(float(1000 + 10 * min(i, 20)), 0.1 if i < 20 else 0.0, 100, 50) for i in range(80)]
    assert growth(samples, 0.25) == {
        "memory_mib": 0.0,
        "shared_mib": pytest.approx(0, abs=0.11),
        "descriptors": 0.0,
        "threads": 0.0,
    }
    leaking = [ProcessUsage(float(1000 + i), 0.0, 100 + i, 50) for i in range(80)]
    assert growth(leaking, 0.25)["memory_mib"] == pytest.approx(40 / 1029.5)
    assert growth(leaking, 0.25)["descriptors"] > 0.3
    assert growth(samples[:2], 0.25) == {}


def test_a_look_at_this_process() -> None:
    sample = measure_usage(os.getpid())
    assert sample.memory_mib > 5
    assert sample.descriptors > 0
    assert sample.threads > 0
