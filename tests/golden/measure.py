"""Compares every method that has golden data with it: ``python -m tests.golden.measure`` writes agreement.json.

The parity tests judge by the same comparisons and check that the file, which the README quotes, is up to date.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from promprune_vllm import VisionFeatures, select
from promprune_vllm.kernels.ops import cosine_gram, in_force
from promprune_vllm.methods.cdpruner import conditional_dpp, text_relevance
from tests.golden import recipe

AGREEMENT = recipe.HERE / "agreement.json"
INCOMPARABLE = "cannot compare: this numpy draws another stream than the one the golden inputs came from"


@dataclass(frozen=True)
class Outcome:
    """What we keep and what the reference kept, in raster order."""

    ours: list[int]
    stored: list[int]
    judged: bool = True

    @property
    def equal(self) -> bool:
        return self.ours == self.stored


@dataclass(frozen=True)
class Comparison:
    """How a method is run on a golden case, and what the count of equal sets means."""

    run: Callable[[recipe.Case], Outcome]
    against: str
    cheap: bool = True  # a few seconds on one core


def _features(golden: recipe.Case) -> VisionFeatures:
    x = torch.from_numpy(golden.x)
    attention = torch.from_numpy(golden.attention)
    return VisionFeatures(projected=x, grid=(1, 1, golden.meta["n"]), saliency=attention, encoder=x)


def tower_features(golden: recipe.Case) -> VisionFeatures:
    """The case as its tower has it, without CLS."""
    tower = recipe.tower(golden)
    return VisionFeatures(
        projected=torch.from_numpy(golden.x),
        grid=(1, 1, golden.meta["n"]),
        saliency=torch.from_numpy(tower.attention).double().sum(dim=0),
        encoder=torch.from_numpy(tower.hidden[1:]),
        keys=torch.from_numpy(tower.keys[1:]),
    )


def _promprune(golden: recipe.Case) -> Outcome:
    meta = golden.meta
    options = {name: meta[name] for name in ("mu", "tau") if name in meta}
    ours = select(_features(golden), meta["budget"], "promprune", **options).indices
    stored = sorted([*golden.stored["s1"].tolist(), *golden.stored["s2"].tolist()])
    return Outcome(ours.tolist(), stored, judged=meta["class"] == "strict")


def _divprune(golden: recipe.Case) -> Outcome:
    ours = select(_features(golden), golden.meta["T"], "divprune").indices
    stored = sorted(golden.stored["idx"].tolist())
    return Outcome(ours.tolist(), stored, judged=golden.meta["dups"] == 0)


def _vispruner(golden: recipe.Case) -> Outcome:
    ours = select(_features(golden), golden.meta["T"], "vispruner", r=golden.meta["r"]).indices
    return Outcome(
        ours.tolist(), golden.stored["mask64"].tolist(), judged=not golden.meta["kind"].startswith("dup")
    )


def _visionzip(golden: recipe.Case) -> Outcome:
    keep = golden.meta["dom"] + golden.meta["ctx"] - 1
    ours = select(tower_features(golden), keep, "visionzip").indices
    return Outcome(ours.tolist(), visionzip_anchors(golden).sort().values.tolist())


def visionzip_anchors(golden: recipe.Case) -> Tensor:
    """Patches at whose places the reference's rows stand, in its order: dominant ones, then targets."""
    stored = {name: torch.from_numpy(array).long() for name, array in golden.stored.items()}
    dominant = (stored["all_idx"][stored["all_idx"] > 0] - 1).sort().values
    return torch.cat([dominant, visionzip_rest(golden)[stored["targets"]]])


def visionzip_rest(golden: recipe.Case) -> Tensor:
    """Patches that are not dominant, in raster order: the numbering of its targets."""
    taken = set(golden.stored["all_idx"].tolist())
    return torch.tensor([patch for patch in range(golden.meta["n"]) if patch + 1 not in taken])


def _prunesid(golden: recipe.Case) -> Outcome:
    ours = select(tower_features(golden), golden.meta["T"] - 1, "prunesid").indices
    return Outcome(ours.tolist(), sorted(index - 1 for index in golden.stored["idx_exact"].tolist() if index))


def _cdpruner(golden: recipe.Case) -> Outcome:
    clip = recipe.clip(golden)
    relevance = text_relevance(torch.from_numpy(clip.patches), torch.from_numpy(clip.text), sign=-1)
    ours = conditional_dpp(cosine_gram(torch.from_numpy(golden.x)), relevance, golden.meta["T"])
    stored = golden.stored["mask"].tolist()
    return Outcome(ours.sort().values.tolist(), stored, judged=not golden.meta["kind"].startswith("dup"))


COMPARISONS = {
    "promprune": Comparison(_promprune, "authors' code, where its rounding does not decide", cheap=False),
    "divprune": Comparison(_divprune, "authors' code, where no tokens are equal"),
    "vispruner": Comparison(_vispruner, "authors' code in float64, where no tokens are equal"),
    "visionzip": Comparison(_visionzip, "authors' code; merged rows to 1e-4"),
    # Not asserted anew everywhere: its last places go by an unstable sort, which differs between processors.
    "prunesid": Comparison(_prunesid, "authors' code with an exact SVD", cheap=False),
    "cdpruner": Comparison(_cdpruner, "authors' code with CLIP's relevance, where no tokens are equal"),
}


def outcome(method: str, number: int) -> Outcome:
    """Run one case, named by its ``case`` number, once on each path."""
    return _outcome(method, number, in_force(torch.device("cpu")))


@cache
def _outcome(method: str, number: int, path: str) -> Outcome:
    meta = next(meta for meta in recipe.metas(method) if meta["case"] == number)
    golden = recipe.case(method, meta)
    if not recipe.comparable(golden):
        raise LookupError(INCOMPARABLE)
    return COMPARISONS[method].run(golden)


def agreement(method: str) -> dict[str, Any]:
    """Count the cases in which we keep the very tokens the reference kept, among those it can be judged by."""
    judged = [result for meta in recipe.metas(method) if (result := outcome(method, meta["case"])).judged]
    equal = sum(result.equal for result in judged)
    return {"equal": equal, "total": len(judged), "against": COMPARISONS[method].against}


def main() -> None:
    """Write the file anew."""
    measured = {method: agreement(method) for method in sorted(COMPARISONS)}
    AGREEMENT.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    for method, result in measured.items():
        print(f"{method:12} {result['equal']}/{result['total']}  {result['against']}")


if __name__ == "__main__":
    main()
