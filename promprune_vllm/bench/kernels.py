"""``promprune bench kernels``: selection on the CPU, ours beside our reference and the plain float32 procedure.

All variants of a case run in turns in one process on the same synthetic features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promprune_vllm.bench import kernels_cuda, machine, plain, spectra, workload
from promprune_vllm.bench.kernel_cases import LARGE, Case, path
from promprune_vllm.bench.kernels_report import show, show_cuda
from promprune_vllm.bench.provenance import provenance
from promprune_vllm.demo.threads import torch_threads
from promprune_vllm.kernels import cpu_cosines, cpu_gram, cpu_loops, cpu_ops, ops, torch_greedy, torch_ops

_NOTHING = np.empty(0, np.int64)


def run(
    wanted: Sequence[Case], *, threads: int, repeats: int, dtype: str, as_json: bool, device: str = "cpu"
) -> None:
    """Measure and print.

    Raises:
        ValueError: A type the features cannot have, or a device that is not there.
        RuntimeError: Ours kept other tokens than the float64 reference.
    """
    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, not {dtype!r}")
    if device == "cuda":
        found = kernels_cuda.run(wanted, repeats=repeats, dtype=kind)
        print(json.dumps(found, indent=2)) if as_json else show_cuda(found)
        return
    if device != "cpu":
        raise ValueError(f"--device must be cpu or cuda, not {device!r}")
    what, timed = machine.clock(threads)
    with torch_threads(threads):
        cpu_ops.warm_up()
        result: dict[str, Any] = {
            **provenance(),
            "threads": threads,
            "features": f"{spectra.TIMED}, seed 0, {dtype}",
            "repeats": repeats,
            "clock": what,
            "cases": [_measured_fast(case, repeats, kind, timed) for case in wanted],
            "entropy": [_entropies(family) for family in spectra.FAMILIES],
        }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


def _measured_fast(case: Case, repeats: int, dtype: torch.dtype, timed: machine.Clock) -> dict[str, Any]:
    with path("fast"):
        return _measured(case, repeats, dtype, timed)


def _measured(case: Case, repeats: int, dtype: torch.dtype, timed: machine.Clock) -> dict[str, Any]:
    if case.needs > machine.available_memory():
        return {"case": str(case), "skipped": f"the reference needs about {case.needs / 2**30:.0f} GiB"}
    if case.n > LARGE:
        repeats = 1
    images = workload.Images.drawn(case.images, case.n, case.d, dtype, torch.device("cpu"))

    def ours() -> list[Tensor]:
        return images.ours(case.keep)

    def reference() -> list[Tensor]:
        with path("reference"):
            return images.ours(case.keep)

    def plainly() -> list[Tensor]:
        return images.plainly(case.keep)

    whole = {"ours": ours, "reference": reference, "plain": plainly}
    picks = {name: [set(kept.tolist()) for kept in choose()] for name, choose in whole.items()}
    if picks["ours"] != picks["reference"]:
        raise RuntimeError(f"{case}: ours kept other tokens than the float64 reference; please report this")
    memory = machine.peak_memory(ours)
    flips = sum(len(a - b) for a, b in zip(picks["plain"], picks["reference"], strict=True))
    return {
        "case": str(case),
        "whole": machine.in_turns(whole, repeats, timed),
        "stages": machine.in_turns(_stages(images.tokens[0], images.saliency, case.keep), repeats, timed),
        "plain_flips": flips,
        "memory_bytes": memory,
        "memory_in_matrices": None if memory is None else round(memory / (4 * case.n**2), 2),
    }


def _stages(x: Tensor, saliency: Tensor, keep: int) -> dict[str, Callable[[], object]]:
    """Time one image step by step, each step on results that are at hand."""
    order = ops.descending_order(saliency)
    given = keep // 4
    single = cpu_gram.cosines(x, torch.float32)[0]
    shared = cpu_cosines.Cosines(x)
    shared.greedy_dpp(order, torch.tensor(given), keep)  # takes its Gram, which is then at hand
    centred, kernel = plain.centred_gram(x), plain.kernel(x)
    salient = order[:given]
    exact = torch_ops.cosine_gram(x)
    count = torch.tensor(given)
    return {
        "ours gram": lambda: cpu_gram.cosines(x, torch.float32),
        "ours entropy": lambda: cpu_ops.entropy_of_gram(x, single),
        "ours loop": lambda: cpu_loops.greedy_dpp(
            single.numpy(), order.numpy(), given, keep, np.empty(0), _NOTHING, cpu_cosines.MARGIN
        ),
        "ours loop and decision": lambda: shared.greedy_dpp(order, count, keep),
        "plain grams": lambda: (plain.centred_gram(x), plain.kernel(x)),
        "plain entropy": lambda: plain.entropy_of(centred),
        "plain loop": lambda: plain.greedy(kernel, salient, keep),
        "reference gram": lambda: torch_ops.cosine_gram(x),
        "reference entropy": lambda: torch_ops.spectral_entropy(x),
        "reference loop": lambda: torch_greedy.greedy_dpp(exact, order, count, keep),
    }


def _entropies(family: str, n: int = 576, d: int = 4096, keep: int = 64) -> dict[str, Any]:
    """Compare the entropies of one family with float64, and the splits of a budget that follow from them.

    The split is taken at 241 values of mu around the entropy, within 0.06 of it, where it changes at all.
    """
    x = spectra.features(family, n, d)
    exact = torch_ops.spectral_entropy(x)
    found = {"ours": cpu_ops.spectral_entropy(x), "plain": plain.entropy_of(plain.centred_gram(x))}
    grid = (float(exact) + torch.linspace(-0.06, 0.06, 241, dtype=torch.float64)).tolist()
    row: dict[str, Any] = {"family": family, "entropy": float(exact)}
    for name, value in found.items():
        apart = [
            abs(plain.split(value, keep, mu, workload.TAU) - plain.split(exact, keep, mu, workload.TAU))
            for mu in grid
        ]
        row[name] = {
            "error": abs(float(value) - float(exact)),
            "splits_that_differ": sum(map(bool, apart)) / len(apart),
            "most_tokens": max(apart),
        }
    return row
