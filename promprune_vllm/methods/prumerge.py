"""PruMerge and PruMerge+: the most attended tokens, each enriched by its nearest neighbors in key space.

Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv 2403.15388. Checked
against the authors' code (42Shawn/LLaVA-PruMerge 097c04116a). Works on the tower's output tokens; the projector
comes after the merge.

1. Kept tokens: the K - 1 with the most CLS attention a. PruMerge+ takes a quarter of them by attention and
   spaces the others evenly over the rest of the image.
2. Each kept row is enriched by its 32 nearest others, kept or not, by cosine of the keys:
   ``x_i + sum a_j x_j``. The weights are not normalized.
3. One extra row collects the dropped tokens: ``sum a_j x_j`` over the tokens that are not kept.

Deviations:
* A different layer: the authors take attention and keys from CLIP's last layer (23); we take them from the layer
  that feeds the projector (22), the last one vLLM builds. They also treat the 1024 columns as one head, while our
  attention and keys are means over the heads.
* A fixed budget: the authors choose the number by the outliers of the attention (above Q3 + 1.5 IQR), which is
  not known before the encoder runs. The quarter in PruMerge+ follows from its step ``1 / (3 ratio)``.
* The spaced tokens are spread over the tokens not yet kept, so that their number is exact.
* The extra row takes the position of the dropped token with the most attention, and all rows are in raster
  order. The reference puts the extra row last, after the others by attention. K = 1 is the extra row alone.
* The published accuracy comes from a model fine-tuned for these rows.
* Everything is float64; equal attention or similarity goes to the lowest index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import complement, cross_cosine, descending_order, finite_rows, quantized


@register
@dataclass(frozen=True, slots=True)
class PruMerge:
    """The most attended tokens with their neighbors merged in, and one row for everything dropped.

    Args:
        plus: PruMerge+: three quarters of the kept tokens are spaced evenly over the image.
        neighbours: Number of tokens merged into each kept one, at least 0; at most all others are.
    """

    name: ClassVar[str] = "prumerge"
    needs: ClassVar[Need] = Need.ENCODER | Need.KEYS | Need.SALIENCY
    paper: ClassVar[str] = "arXiv 2403.15388"
    merges: ClassVar[bool] = True

    plus: bool = False
    neighbours: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.plus, bool):
            raise ValueError(f"plus must be true or false, got {self.plus!r}")
        if not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise ValueError(f"neighbours must be an integer of at least 0, got {self.neighbours!r}")

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens; all of their rows are merged."""
        encoder, keys, saliency = features.encoder, features.keys, features.saliency
        assert encoder is not None
        assert keys is not None
        assert saliency is not None
        order = descending_order(saliency)
        by_attention = -(-(keep - 1) // 4) if self.plus else keep - 1
        kept = _add_spaced(order[:by_attention], features.tokens, keep - 1)  # (K - 1,)
        dropped = complement(kept, features.tokens)
        a = saliency.double().nan_to_num(0, 0, 0)
        x = finite_rows(encoder)
        enriched = x[kept] + self._neighbor_weights(keys, kept, a) @ x
        extra = a[dropped] @ x[dropped]  # (Dv,)
        extra_position = dropped[descending_order(saliency[dropped])[:1]]
        anchors, raster = torch.cat([kept, extra_position]).sort()
        rows = torch.cat([enriched, extra[None]])[raster].to(encoder.dtype)
        return Selection(anchors, rows=rows, space=Need.ENCODER)

    def _neighbor_weights(self, keys: Tensor, kept: Tensor, a: Tensor) -> Tensor:
        """Return the weight of every token in each kept row, ``(K - 1, N)``."""
        similarity = quantized(cross_cosine(keys[kept], keys))
        itself = kept[:, None] == torch.arange(keys.shape[0], device=kept.device)
        ranking = torch.argsort(similarity.masked_fill(itself, -torch.inf), dim=1, descending=True, stable=True)
        nearest = ranking[:, : min(self.neighbours, keys.shape[0] - 1)]
        return torch.zeros_like(similarity).scatter(1, nearest, a[nearest])


def _add_spaced(kept: Tensor, total: int, count: int) -> Tensor:
    """Return the kept tokens and enough evenly spaced others to make ``count``."""
    rest, more = complement(kept, total), count - kept.shape[0]
    steps = torch.arange(more, device=kept.device) * rest.shape[0] // max(1, more)
    return torch.cat([kept, rest[steps]])
