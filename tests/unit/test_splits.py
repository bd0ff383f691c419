"""Fixed splits are PromPrune with the share held fixed, and nothing else."""

from __future__ import annotations

import pytest
import torch

from promprune_vllm import VisionFeatures, get_method, select


@pytest.mark.parametrize("percent", [0, 25, 50, 75])
@pytest.mark.parametrize("keep", [1, 2, 6, 17, 40])
def test_a_split_is_promprune_with_a_fixed_share(percent: int, keep: int) -> None:
    generator = torch.Generator().manual_seed(percent + keep)
    features = VisionFeatures(
        projected=torch.randn(48, 24, generator=generator),
        grid=(1, 6, 8),
        saliency=torch.rand(48, generator=generator),
    )
    share = percent / 100
    split = select(features, keep, get_method(f"split-{percent}"))
    fixed = select(features, keep, get_method("promprune", kr_min=share, kr_max=share))
    assert torch.equal(split.indices, fixed.indices)
    assert torch.equal(split.report["saliency_tokens"], fixed.report["saliency_tokens"])
