"""VisionZip: dominant tokens by attention, the rest merged into contextual ones.

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467. Checked against
the authors' code (dvlab-research/VisionZip 3151f6df4f). Works on the tower's output tokens; the projector comes
after the merge.

1. Dominant tokens: the D with the most CLS attention.
2. Contextual targets: of the R tokens left, in raster order, every ``max(1, floor(R / C))``-th; the first C.
3. Every other token is assigned to the target with the most similar attention key (cosine, keys averaged over
   heads).
4. A target's row becomes ``x_target + mean of the x assigned to it``: a sum of two, not a mean of all.

How K is split into D and C: the authors' pairs (54, 10), (108, 20) and (162, 30) count the CLS token among the
dominant ones and pass it to the language model. Our tokens are patches only, so their T is our K + 1, and
``C = round(K * 10 / 64)`` with ``D = K - C`` gives (53, 10), (107, 20) and (161, 30) at K = T - 1: their sets
without CLS. (With K = T, one more patch replaces CLS.)

Deviations:
* Merged rows are in raster order, at the position of their target. The reference puts them all last.
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
class VisionZip:
    """The most attended tokens unchanged, and all others merged into a few contextual ones.

    Args:
        contextual_share: Share C / K of the budget for the contextual tokens, from 0 to 1.
    """

    name: ClassVar[str] = "visionzip"
    needs: ClassVar[Need] = Need.ENCODER | Need.KEYS | Need.SALIENCY
    paper: ClassVar[str] = "arXiv 2412.04467"
    merges: ClassVar[bool] = True

    contextual_share: float = 10 / 64

    def __post_init__(self) -> None:
        if not 0 <= self.contextual_share <= 1:
            raise ValueError(f"contextual_share must be from 0 to 1, got {self.contextual_share}")

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens; the contextual ones have merged rows."""
        encoder, keys, saliency = features.encoder, features.keys, features.saliency
        assert encoder is not None
        assert keys is not None
        assert saliency is not None
        contextual = round(keep * self.contextual_share)
        dominant = descending_order(saliency)[: keep - contextual].sort().values  # (D,)
        rest = complement(dominant, features.tokens)  # (R,)
        slots, into = assign(keys[rest], contextual)
        x = finite_rows(encoder)[rest]
        member = (into == torch.arange(contextual, device=into.device)[:, None]).double()  # (C, R)
        merged = x[slots] + member @ x / member.sum(dim=1, keepdim=True).clamp_min(1)
        anchors, raster = torch.cat([dominant, rest[slots]]).sort()
        rows = torch.cat([encoder[dominant], merged.to(encoder.dtype)])[raster]
        return Selection(anchors, rows=rows, space=Need.ENCODER)


def assign(keys: Tensor, targets: int) -> tuple[Tensor, Tensor]:
    """Choose evenly spaced targets among some tokens and assign the other tokens to them.

    Args:
        keys: ``(R, Dk)`` attention keys of the tokens, in raster order.
        targets: Number of targets C, below R.

    Returns:
        Indices of the targets, ``(C,)``; and for each token the number of its target, ``(R,)``, from 0: -1 for
        the targets themselves, and for all if there are no targets.
    """
    total = keys.shape[0]
    slots = torch.arange(targets, device=keys.device) * max(1, total // max(1, targets))
    if targets == 0:
        return slots, torch.full((total,), -1, device=keys.device)
    into = quantized(cross_cosine(keys, keys[slots])).argmax(dim=1)  # (R,)
    return slots, into.index_fill(0, slots, -1)
