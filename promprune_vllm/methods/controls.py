"""Controls that every method must beat: ``random`` and ``uniform``.

Random selection is a strong baseline: UniPruneBench (arXiv 2511.02650) reports that it beats most published
methods on LLaVA-1.5-7B with 66.7 % and 77.8 % of the tokens pruned. Every comparison of methods includes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import token_keys


@register
@dataclass(frozen=True, slots=True)
class Random:
    """Random tokens, drawn uniformly and seeded by the image's content so that caches stay valid.

    Args:
        seed: A different seed draws a different set for the same image.
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[Need] = Need.PROJECTED
    paper: ClassVar[str] = "control"
    merges: ClassVar[bool] = False

    seed: int = 0

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep the tokens with the smallest content-seeded keys."""
        keys = token_keys(features.projected, self.seed)  # (N,)
        return Selection(torch.argsort(keys, stable=True)[:keep].sort().values)


@register
@dataclass(frozen=True, slots=True)
class Uniform:
    """Evenly spaced tokens in raster order, regardless of content: token ``floor((i + 1/2) N / K)`` for each i."""

    name: ClassVar[str] = "uniform"
    needs: ClassVar[Need] = Need.PROJECTED
    paper: ClassVar[str] = "control"
    merges: ClassVar[bool] = False

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep every (N/K)-th token."""
        return Selection(evenly_spaced(keep, features.tokens, features.projected.device))


def evenly_spaced(keep: int, total: int, device: torch.device) -> Tensor:
    """Return ``keep`` of ``total`` tokens, ``(keep,)`` int64: ``floor((i + 1/2) total / keep)`` for each i."""
    steps = torch.arange(keep, device=device)
    return (2 * steps + 1) * total // (2 * keep)
