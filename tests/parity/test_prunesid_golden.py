"""PruneSID against the authors' pipeline with an exact SVD in place of the randomised one (``idx_exact``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from promprune_vllm import VisionFeatures, select
from promprune_vllm.methods.prunesid import component_loadings, group_quotas
from tests.golden import recipe

METAS = recipe.metas("prunesid")
pytestmark = pytest.mark.usefixtures("kernels")


def _name(meta: dict[str, Any]) -> str:
    return f"{meta['kind']}-k{meta['T']}"


def _features(golden: recipe.Case) -> VisionFeatures:
    tokens = torch.from_numpy(golden.x)
    saliency = torch.from_numpy(recipe.tower(golden).attention).mean(dim=0)
    return VisionFeatures(projected=tokens, encoder=tokens, grid=(1, 24, 24), saliency=saliency)


def _check_inputs(golden: recipe.Case) -> None:
    """The file carries no digest; the inputs are those of ``cdpruner.npz``, which does."""
    for meta in recipe.metas("cdpruner"):
        if all(meta[key] == golden.meta[key] for key in ("kind", "n", "d", "seed")):
            if recipe.digest(golden.x) != meta["xsha"]:
                pytest.skip("cannot compare: this numpy draws another stream than the golden inputs came from")
            return
    raise AssertionError(f"no digest for {golden.meta}")


@pytest.mark.parametrize("meta", METAS, ids=_name)
def test_groups_are_the_references(meta: dict[str, Any]) -> None:
    golden = recipe.case("prunesid", meta)
    _check_inputs(golden)
    group = component_loadings(torch.from_numpy(golden.x), meta["T"] // 4).argmax(dim=1)
    assert group.tolist() == golden.stored["belong"].tolist()


@pytest.mark.parametrize("meta", METAS, ids=_name)
def test_selects_the_references_patches(meta: dict[str, Any]) -> None:
    golden = recipe.case("prunesid", meta)
    _check_inputs(golden)
    stored = golden.stored["idx_exact"].tolist()
    assert stored[0] == 0  # CLS, which the reference counts
    expected = {index - 1 for index in stored[1:]}
    got = set(select(_features(golden), meta["T"] - 1, "prunesid").indices.tolist())
    if got == expected:
        return
    # What limits held back goes round the groups by number of survivors, and the reference leaves the order of
    # equal groups to an unstable sort, which another kind of processor may settle another way. Nothing else may
    # differ.
    survivors = golden.stored["keep_counts"]
    (disputed,) = {int(survivors[golden.stored["belong"][token]]) for token in got ^ expected}
    assert (survivors == disputed).sum() > 1
    assert len(got & expected) >= 124


@pytest.mark.parametrize("seed", range(20))
def test_quotas_are_those_of_the_step_by_step_rule(seed: int) -> None:
    draw = np.random.Generator(np.random.PCG64(seed))
    size = draw.integers(0, 40, size=9)
    size[draw.integers(9)] += 1
    survivors = np.array([draw.integers(1, most + 1) if most else 0 for most in size])
    for keep in {1, 2, int(size.sum()) // 3, int(size.sum()) - 1} & set(range(1, int(size.sum()))):
        budget = keep + 1
        most = np.minimum(np.minimum(5 * -(-budget // 64), size), survivors)
        while most.sum() < budget:
            most = np.minimum(most + 1, size)
        least = np.minimum(size, 1)
        if least.sum() > keep:
            continue  # more groups than tokens: the reference has at least four tokens per group
        reached = np.round(np.cumsum(survivors) * (keep - least.sum()) / survivors.sum()).astype(int)
        quota = np.minimum(least + np.diff(reached, prepend=0), most)
        for group in np.argsort(-survivors, kind="stable"):
            quota[group] += min(most[group] - quota[group], keep - quota.sum())
        got = group_quotas(torch.from_numpy(size), torch.from_numpy(survivors), keep)
        assert got.tolist() == quota.tolist()
        assert int(got.sum()) == keep
