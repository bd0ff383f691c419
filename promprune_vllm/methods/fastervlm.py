"""FasterVLM: the tokens that CLS attends to most.

Paper: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818v1 (version 2
of this arXiv entry is VisPruner). Checked against the authors' code (Theia-4869/FasterVLM f5d5f12037).

1. ``a_i``: attention from CLS to patch i in the layer that feeds the projector, mean over heads.
2. Keep the K tokens with the largest ``a_i``, in raster order.

Deviation: attention is compared in float32 and ties go to the lowest index. The reference compares in float16 and
leaves ties undefined. Selects the same tokens as PromPrune with ``kr_min = kr_max = 1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import descending_order


@register
@dataclass(frozen=True, slots=True)
class FasterVLM:
    """The most salient tokens: the K with the most CLS attention."""

    name: ClassVar[str] = "fastervlm"
    needs: ClassVar[Need] = Need.SALIENCY
    paper: ClassVar[str] = "arXiv 2412.01818v1"
    merges: ClassVar[bool] = False

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep the ``keep`` tokens with the largest saliency."""
        assert features.saliency is not None
        return Selection(descending_order(features.saliency)[:keep].sort().values)
