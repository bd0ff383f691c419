"""VisionZip: dominant tokens by attention, the rest merged into contextual ones.

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467. Read against
the authors' code (dvlab-research/VisionZip 3151f6df4f). Works on tokens as the tower gives them; the projector
comes after the merge.

1. Dominant tokens: the D with the most CLS attention.
2. Contextual targets: of the R tokens left, in raster order, every ``max(1, floor(R / C))``-th one; the first C.
3. Every other token goes to the target whose attention key is most similar (cosine, keys averaged over heads).
4. A target's row becomes ``x_target + mean of the x assigned to it``: a sum of two, not a mean of all.

How K becomes D and C: the authors' pairs (54, 10), (108, 20) and (162, 30) count the CLS token among the
dominant ones and hand it to the language model. Our tokens are patches only, so their T is our K + 1, and
``C = round(K * 10 / 64)`` with ``D = K - C`` gives (53, 10), (107, 20) and (161, 30) at K = T - 1: their sets
without CLS. (With K = T a patch more takes the place of CLS.)

Deviations:
* Merged rows stand in raster order at the place of their target. The reference puts all of them last.
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
from promprune_vllm.kernels.ops import complement, cross_cosine, descending_order, finite_rows, settled


@register
@dataclass(frozen=True, slots=True)
class VisionZip:
    """The most attended tokens as they are, and everything else merged into a few contextual ones.

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
        """Keep ``keep`` tokens; the rows of the contextual ones are merged."""
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
        targets: Their number C, below R.

    Returns:
        Positions of the targets, ``(C,)``, and for each token the target it is merged into, ``(R,)``, counted
        from 0; -1 for the targets themselves and where there is none.
    """
    total = keys.shape[0]
    slots = torch.arange(targets, device=keys.device) * max(1, total // max(1, targets))
    if targets == 0:
        return slots, torch.full((total,), -1, device=keys.device)
    into = settled(cross_cosine(keys, keys[slots])).argmax(dim=1)  # (R,)
    return slots, into.index_fill(0, slots, -1)
