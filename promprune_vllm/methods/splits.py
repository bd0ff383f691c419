"""Fixed splits of the budget between salient and covering tokens: what PromPrune's adaptive split must beat.

The paper's own ablation (arXiv 2603.14892, Table 4) uses the same two stages with a fixed salient share, whatever
the entropy. These methods are ``promprune`` with ``kr_min = kr_max``, under their own names so that a request can
choose one. A share of 100% is ``fastervlm``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.methods.promprune import PromPrune


class _Split:
    needs: ClassVar[Need] = Need.PROJECTED | Need.SALIENCY
    paper: ClassVar[str] = "control"
    merges: ClassVar[bool] = False
    percent: ClassVar[int]

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep the most attended tokens for ``percent`` of ``keep``, and covering tokens for the rest."""
        share = self.percent / 100
        # A preset entropy avoids computing the spectrum; with a fixed share its value does not matter.
        entropy = torch.zeros((), dtype=torch.float64, device=features.projected.device)
        selection = PromPrune(kr_min=share, kr_max=share).select(replace(features, entropy=entropy), keep)
        return Selection(selection.indices, report={"saliency_tokens": selection.report["saliency_tokens"]})


@register
@dataclass(frozen=True, slots=True)
class Split0(_Split):
    """PromPrune's second stage alone: covering tokens only."""

    name: ClassVar[str] = "split-0"
    percent: ClassVar[int] = 0


@register
@dataclass(frozen=True, slots=True)
class Split25(_Split):
    """PromPrune with a quarter of the budget for salient tokens, whatever the image."""

    name: ClassVar[str] = "split-25"
    percent: ClassVar[int] = 25


@register
@dataclass(frozen=True, slots=True)
class Split50(_Split):
    """PromPrune with half of the budget for salient tokens, whatever the image."""

    name: ClassVar[str] = "split-50"
    percent: ClassVar[int] = 50


@register
@dataclass(frozen=True, slots=True)
class Split75(_Split):
    """PromPrune with three quarters of the budget for salient tokens, whatever the image."""

    name: ClassVar[str] = "split-75"
    percent: ClassVar[int] = 75
