"""``promprune bench kernels --device cuda``: the same cases on a GPU, eager and replayed from a CUDA graph.

Times are device times between two CUDA events. An eager selection is many small launches, so its time is mostly
the host's; replayed from a graph, it is the kernels'. A server pays the eager time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from promprune_vllm.bench import machine, spectra, workload
from promprune_vllm.bench.kernel_cases import Case, use_path
from promprune_vllm.bench.provenance import provenance
from promprune_vllm.kernels import ops

HEADS, WIDTH, MERGED = 16, 80, 4
"""Heads and head size of Qwen2.5-VL's vision attention, and its patches per visual token."""


def run(wanted: Sequence[Case], *, repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    """Measure every case.

    Raises:
        ValueError: No CUDA device is available.
    """
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    device = torch.device("cuda")
    ops.warm_up(device)
    return {
        **provenance(),
        "gpu": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "features": f"{spectra.TIMED}, seed 0, {str(dtype).removeprefix('torch.')}",
        "repeats": repeats,
        "clock": "device time between CUDA events",
        "path": ops.in_force(device),
        "cases": [_measure(case, repeats, dtype, device) for case in wanted],
    }


def _measure(case: Case, repeats: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    images = workload.Images.generate(case.images, case.n, case.d, dtype, device)

    def ours() -> list[Tensor]:
        return images.select(case.keep)

    q, k = (torch.randn(MERGED * case.n, HEADS, WIDTH, device=device).to(dtype) for _ in range(2))

    def received() -> Tensor:
        return ops.received_attention(q, k, WIDTH**-0.5)

    with use_path("reference"):
        expected = [set(tokens.tolist()) for tokens in ours()]
    kept = [set(tokens.tolist()) for tokens in ours()]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours()
    memory = torch.cuda.max_memory_allocated() - before
    variants: dict[str, Callable[[], object]] = {
        "eager": ours,
        "graph": _captured(ours),
        "plain": lambda: images.select_plain(case.keep),
    }
    if case.is_clip:

        def of_clip() -> Tensor:
            return images.select_of_clip(case.keep)

        variants |= {"promprune-video, eager": of_clip, "promprune-video, graph": _captured(of_clip)}
    if case.n >= 1000:
        variants |= {"received attention, eager": received, "received attention, graph": _captured(received)}
    return {
        "case": str(case),
        "whole": machine.time_interleaved(variants, repeats, _device_time),
        "other_tokens": sum(len(a - b) for a, b in zip(kept, expected, strict=True)),
        "memory_bytes": memory,
    }


def _captured(function: Callable[[], object]) -> Callable[[], object]:
    """Capture a function in a CUDA graph, and return a function that replays it."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _device_time(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))
