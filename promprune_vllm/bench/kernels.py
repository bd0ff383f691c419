"""``promprune bench kernels``: selection on the CPU: our kernels, our reference, and the plain float32 procedure.

"Plain" is straightforward float32 torch (``plain.py``). All variants of a case run interleaved in one process on
the same synthetic features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promprune_vllm.bench import kernels_cuda, machine, plain, spectra, workload
from promprune_vllm.bench.kernel_cases import LARGE, Case, use_path
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
        ValueError: A dtype that the features cannot have, or a device that is not available.
        RuntimeError: Our kernels kept other tokens than the float64 reference.
    """
    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if device == "cuda":
        document = kernels_cuda.run(wanted, repeats=repeats, dtype=kind)
        print(json.dumps(document, indent=2)) if as_json else show_cuda(document)
        return
    if device != "cpu":
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    what, timed = machine.clock(threads)
    with torch_threads(threads):
        cpu_ops.warm_up()
        result: dict[str, Any] = {
            **provenance(),
            "threads": threads,
            "features": f"{spectra.TIMED}, seed 0, {dtype}",
            "repeats": repeats,
            "clock": what,
            "cases": [_measure_fast(case, repeats, kind, timed) for case in wanted],
            "entropy": [_entropies(family) for family in spectra.FAMILIES],
        }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


def _measure_fast(case: Case, repeats: int, dtype: torch.dtype, timed: machine.Clock) -> dict[str, Any]:
    with use_path("fast"):
        return _measure(case, repeats, dtype, timed)


def _measure(case: Case, repeats: int, dtype: torch.dtype, timed: machine.Clock) -> dict[str, Any]:
    if case.needs > machine.available_memory():
        return {"case": str(case), "skipped": f"the reference needs about {case.needs / 2**30:.0f} GiB"}
    if case.n > LARGE:
        repeats = 1
    images = workload.Images.generate(case.images, case.n, case.d, dtype, torch.device("cpu"))

    def ours() -> list[Tensor]:
        return images.select(case.keep)

    def reference() -> list[Tensor]:
        with use_path("reference"):
            return images.select(case.keep)

    def plain_selection() -> list[Tensor]:
        return images.select_plain(case.keep)

    whole: dict[str, Callable[[], Any]] = {"ours": ours, "reference": reference, "plain": plain_selection}
    picks = {name: [set(kept.tolist()) for kept in choose()] for name, choose in whole.items()}
    if case.is_clip:
        whole["promprune-video"] = lambda: images.select_of_clip(case.keep)
    if picks["ours"] != picks["reference"]:
        raise RuntimeError(f"{case}: our kernels kept other tokens than the float64 reference; please report this")
    memory = machine.peak_memory(ours)
    flips = sum(len(a - b) for a, b in zip(picks["plain"], picks["reference"], strict=True))
    return {
        "case": str(case),
        "whole": machine.time_interleaved(whole, repeats, timed),
        "stages": machine.time_interleaved(_stages(images.tokens[0], images.saliency, case.keep), repeats, timed),
        "plain_flips": flips,
        "memory_bytes": memory,
        "memory_in_matrices": None if memory is None else round(memory / (4 * case.n**2), 2),
    }


def _stages(x: Tensor, saliency: Tensor, keep: int) -> dict[str, Callable[[], object]]:
    """Return the steps for one image; the inputs of each step are already computed."""
    order = ops.descending_order(saliency)
    given = keep // 4
    single = cpu_gram.cosines(x, torch.float32)[0]
    shared = cpu_cosines.Cosines(x)
    shared.greedy_dpp(order, torch.tensor(given), keep)  # computes its Gram, which later calls reuse
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
    """Compare the entropies of one family with float64, and the budget splits that follow from them.

    The split is computed for 241 values of mu within 0.06 of the entropy; elsewhere it does not change.
    """
    x = spectra.features(family, n, d)
    exact = torch_ops.spectral_entropy(x)
    computed = {"ours": cpu_ops.spectral_entropy(x), "plain": plain.entropy_of(plain.centred_gram(x))}
    grid = (float(exact) + torch.linspace(-0.06, 0.06, 241, dtype=torch.float64)).tolist()
    row: dict[str, Any] = {"family": family, "entropy": float(exact)}
    for name, value in computed.items():
        differences = [
            abs(plain.split(value, keep, mu, workload.TAU) - plain.split(exact, keep, mu, workload.TAU))
            for mu in grid
        ]
        row[name] = {
            "error": abs(float(value) - float(exact)),
            "splits_that_differ": sum(map(bool, differences)) / len(differences),
            "most_tokens": max(differences),
        }
    return row
