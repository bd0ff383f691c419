"""``promprune bench serving``: what a budget, or adapting to load, gains on a server under load."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from promprune_vllm.bench.load import LEVEL, Load, Result, metrics, run
from promprune_vllm.bench.provenance import provenance
from promprune_vllm.client import base_url
from promprune_vllm.core.budget import AUTO
from promprune_vllm.demo.model import find_or_build_demo_model
from promprune_vllm.demo.server import one_worker, serving
from promprune_vllm.errors import BenchError

_RATIOS = ("requests_per_second", "ttft_p50_ms", "ttft_p99_ms", "kv_usage_mean")
_RETURN_SECONDS = 300
"""Time limit for the level to return to 1: three steps up, each after at most a minute, plus a margin."""


def sweep(url: str, budgets: Sequence[object], loads: Sequence[Load], err: Console) -> dict[str, Any]:
    """Measure every budget under every load, with ratios to the first budget under the same load.

    Args:
        url: Base address of the server.
        budgets: Budgets of the requests; ``None`` sends none. The others are compared with the first.
        loads: Requests to send.
        err: Console that shows the progress.

    Raises:
        BenchError: A run failed.
    """
    rows: list[dict[str, Any]] = []
    for load in loads:
        first: Result | None = None
        for i, budget in enumerate(budgets):
            err.print(f"{load.concurrency} requests in flight, budget {_shown(budget)} …", highlight=False)
            # New images for every run: those of an earlier run may still be cached.
            result = run(url, replace(load, seed=load.seed + 1000 * i + load.concurrency), budget)
            first = first or result
            rows.append({**asdict(result), "ratios": ratios(result, first)})
    return {"kind": "sweep", "rows": rows, "provenance": provenance()}


def compare_adaptive(url: str, fixed: object, load: Load, rounds: int, err: Console) -> dict[str, Any]:
    """Compare ``"auto"`` on a server that adapts to load with a fixed budget on the same server, alternating.

    An explicit budget is never adapted, so its runs behave like a server with that fixed default.

    Args:
        url: Base address of a server with ``adapt_to_load`` that nobody else is using.
        fixed: The server's default, sent explicitly.
        load: Requests to send; they should saturate the server.
        rounds: How often each budget is measured.
        err: Console that shows the progress.

    Raises:
        BenchError: A run failed, or the level does not return to 1.
    """
    rows: list[dict[str, Any]] = []
    for turn in range(rounds):
        first: Result | None = None
        for i, budget in enumerate((fixed, AUTO)):
            waited = wait_for_full_level(url)
            if rows:
                rows[-1]["seconds_until_full_level"] = waited
            err.print(f"Round {turn + 1} of {rounds}, budget {_shown(budget)} …", highlight=False)
            result = run(url, replace(load, seed=load.seed + 1000 * (2 * turn + i)), budget)
            first = first or result
            rows.append({**asdict(result), "ratios": ratios(result, first)})
    rows[-1]["seconds_until_full_level"] = wait_for_full_level(url)
    return {"kind": "adaptive", "rows": rows, "ratios": _median_ratios(rows[1::2]), "provenance": provenance()}


def wait_for_full_level(url: str) -> float:
    """Wait until the adaptation level is back at 1, and return the seconds it took."""
    started = time.monotonic()
    while metrics(url)[LEVEL] != 1:
        if time.monotonic() - started > _RETURN_SECONDS:
            raise BenchError(f"{LEVEL} did not return to 1 within {_RETURN_SECONDS} s after the load.")
        time.sleep(0.2)
    return round(time.monotonic() - started, 1)


def ratios(result: Result, to: Result) -> dict[str, float]:
    """Return the figures of one result divided by those of another."""
    return {name: round(getattr(result, name) / base, 3) for name in _RATIOS if (base := getattr(to, name))}


def _median_ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    medians = {}
    for name in _RATIOS:
        values = [row["ratios"][name] for row in rows if name in row["ratios"]]
        if values:
            medians[name] = round(statistics.median(values), 3)
    return medians


@contextmanager
def a_server(
    url: str | None, model: Path | None, kv_blocks: int, *, adaptive: bool, err: Console
) -> Iterator[str]:
    """Yield the address of the server to measure: the given one, or one started here.

    Args:
        url: A running server; the other arguments are then unused.
        model: Checkpoint to serve; the demo model by default.
        kv_blocks: KV-cache blocks of 32 tokens; few, so that a load fills the cache first.
        adaptive: Whether the server adapts to load.
        err: Console that shows the progress.
    """
    if url is not None:
        yield base_url(url)
        return
    import torch

    options = ["--enforce-eager", "--max-model-len", "2048", "--block-size", "32", "--max-num-seqs", "64"]
    options += ["--num-gpu-blocks-override", str(kv_blocks), "--served-model-name", "demo"]
    options += [] if torch.cuda.is_available() else ["--dtype", "float32"]
    options += ["--visual-token-adapt-to-load"] if adaptive else []
    options, environment = one_worker(options, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    err.print(f"Starting a server with {kv_blocks} KV-cache blocks of 32 tokens …", highlight=False)
    with serving(model or find_or_build_demo_model(), *options, environment=environment) as server:
        yield server.url


def table(document: dict[str, Any]) -> Table:
    """Return the figures as a table for the terminal."""
    shown = Table(title=_title(document), title_justify="left")
    for name in (
        "in flight",
        "budget",
        "kept",
        "requests/s",
        "TTFT p50",
        "TTFT p99",
        "KV mean",
        "KV max",
        "level",
    ):
        shown.add_column(name, justify="left" if name == "budget" else "right")
    for row in document["rows"]:
        by = row["ratios"]
        shown.add_row(
            str(row["concurrency"]),
            _shown(row["budget"]),
            f"{row['kept_share']:.0%}",
            f"{row['requests_per_second']:.2f} ({by['requests_per_second']:.2f}x)",
            f"{row['ttft_p50_ms'] / 1000:.2f} s ({by['ttft_p50_ms']:.2f}x)",
            f"{row['ttft_p99_ms'] / 1000:.2f} s ({by['ttft_p99_ms']:.2f}x)",
            f"{row['kv_usage_mean']:.0%}",
            f"{row['kv_usage_max']:.0%}",
            f"{row['lowest_level']:g}",
        )
    return shown


def _title(document: dict[str, Any]) -> str:
    by = document["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in by["versions"].items())
    return f"{by['machine']}, {by['cores']} cores; {versions}"


def _shown(budget: object) -> str:
    return "none" if budget is None else str(budget)
