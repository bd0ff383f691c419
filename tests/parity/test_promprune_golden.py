"""PromPrune against the stored selections, by the acceptance rules of the golden data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promprune_vllm import VisionFeatures, select
from tests.golden import recipe

METAS = recipe.metas("promprune")
pytestmark = pytest.mark.usefixtures("kernels")


def _name(meta: dict[str, Any]) -> str:
    return f"{meta['kind']}-{meta['n']}x{meta['d']}-s{meta['seed']}-k{meta['budget']}"


def _features(golden: recipe.Case, dtype: torch.dtype = torch.float32) -> VisionFeatures:
    if recipe.digest(golden.x) != golden.meta["xsha"] or recipe.digest(golden.attention) != golden.meta["asha"]:
        pytest.skip("cannot compare: this numpy draws another stream than the one the golden inputs came from")
    return VisionFeatures(
        projected=torch.from_numpy(golden.x).to(dtype),
        grid=(1, 1, golden.meta["n"]),
        saliency=torch.from_numpy(golden.attention).to(dtype),
    )


def _options(meta: dict[str, Any]) -> dict[str, float]:
    return {name: meta[name] for name in ("mu", "tau") if name in meta}


@pytest.mark.parametrize("meta", METAS, ids=_name)
def test_selects_the_canonical_set(meta: dict[str, Any]) -> None:
    golden = recipe.case("promprune", meta)
    selection = select(_features(golden), meta["budget"], **_options(meta))
    assert int(selection.report["saliency_tokens"]) == meta["k_sal64"]
    assert abs(float(selection.report["spectral_entropy"]) - meta["H64"]) < 1e-5 or meta["kind"] == "constant"
    expected = set(golden.stored["s1"].tolist()) | set(golden.stored["canon"].tolist())
    assert set(selection.indices.tolist()) == expected
    assert len(expected) == meta["budget"]


@pytest.mark.parametrize("meta", METAS, ids=_name)
def test_selects_the_same_set_from_float32_and_float64(meta: dict[str, Any]) -> None:
    golden = recipe.case("promprune", meta)
    single, double = (
        select(_features(golden, dtype), meta["budget"], **_options(meta))
        for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(single.indices, double.indices)
    assert int(single.report["saliency_tokens"]) == int(double.report["saliency_tokens"])
