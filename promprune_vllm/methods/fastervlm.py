"""FasterVLM: the tokens CLS attends to most.

Paper: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818v1 (version 2
of the entry is VisPruner). Read against the authors' code (Theia-4869/FasterVLM f5d5f12037).

1. ``a_i``: attention from CLS to patch i in the layer that feeds the projector, mean over heads.
2. Keep the K largest, in raster order.

Deviation: equal attention goes to the lowest index, in float32; the reference leaves it open, in float16.
The same set as PromPrune with ``kr_min = kr_max = 1``.
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
        """Keep the ``keep`` tokens of largest saliency."""
        assert features.saliency is not None
        return Selection(descending_order(features.saliency)[:keep].sort().values)
