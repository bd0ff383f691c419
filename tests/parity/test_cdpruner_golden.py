"""CDPruner against the authors' code: its relevance in CLIP's space, its kernel on the projected tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promprune_vllm.kernels.ops import cosine_gram
from promprune_vllm.methods.cdpruner import conditional_dpp, text_relevance
from tests.golden import recipe

METAS = recipe.metas("cdpruner")
pytestmark = pytest.mark.usefixtures("kernels")


def _name(meta: dict[str, Any]) -> str:
    return f"{meta['kind']}-{meta['n']}x{meta['d']}-k{meta['T']}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("meta", METAS, ids=_name)
def test_selects_the_references_tokens(meta: dict[str, Any], dtype: torch.dtype) -> None:
    golden = recipe.case("cdpruner", meta)
    if not recipe.comparable(golden):
        pytest.skip("cannot compare: this numpy draws another stream than the one the golden inputs came from")
    clip = recipe.clip(golden)
    patches, text = torch.from_numpy(clip.patches).to(dtype), torch.from_numpy(clip.text).to(dtype)
    gram = cosine_gram(torch.from_numpy(golden.x).to(dtype))
    picks = conditional_dpp(gram, text_relevance(patches, text, sign=-1), meta["T"])
    got = set(picks.tolist())
    assert len(got) == meta["T"]
    if meta["kind"].startswith("dup"):  # 48 different tokens: what follows them is rounding in the reference
        distinct = torch.unique(torch.from_numpy(golden.x)[picks], dim=0).shape[0]
        assert distinct == 48
        return
    assert got == set(golden.stored["mask"].tolist()) == set(golden.stored["mask64"].tolist())
