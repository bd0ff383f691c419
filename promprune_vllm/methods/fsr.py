"""FSR (Focus-Scan-Refine): what the question is about, what is most unlike it, and what lies close to that.

Paper: "Focus-Scan-Refine: From Human Visual Perception to Efficient Visual Token Pruning", arXiv 2602.05809.
Written from a note of its formulas; no code was published when this was written, so the merging weights of step 4
are our reading. It is the closest published relative of SPpruner.

1. Score: ``phi = minmax(r)**alpha * minmax(s)**beta`` with saliency s and relevance to the text r.
2. Focus F: the fewest tokens, by descending phi, that hold the share rho of the sum of phi; at most K.
3. Scan S: farthest-point sampling of the other ``K - |F|`` tokens, away from F and from one another.
4. Refine: the ``M = floor(kappa |S|)`` dropped tokens of the highest phi join the scan token most similar to them.
   The row becomes the mean of its members, weighted by phi. Rows of F are left alone.

Deviations:
* The paper takes r from CLIP's text tower, which language models do not load. Here r is the mean cosine of the
  projected token to the language model's embeddings of the text. No text (M = 0 rows): ``r = s``.
* Cosines that differ by less than 2**-32 are equal, and the lowest index wins. Tokens no farther than 1e-5 from
  the set are taken last, by phi.
* NaN saliency gives the lowest score; rows that are not finite resemble nobody.
* Kept tokens stay in raster order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import (
    cosine_gram,
    cross_cosine,
    descending_order,
    farthest_points,
    merge_rows,
    min_max,
    settled,
)


@register
@dataclass(frozen=True, slots=True)
class FSR:
    """Tokens the text asks for, context unlike them, and details merged into the context.

    Args:
        alpha: Exponent of the relevance, at least 0.
        beta: Exponent of the saliency, at least 0.
        rho: Share of the total score the focus holds, above 0 and at most 1.
        kappa: Dropped tokens merged per scan token, at least 0.
    """

    name: ClassVar[str] = "fsr"
    needs: ClassVar[Need] = Need.PROJECTED | Need.SALIENCY | Need.TEXT
    paper: ClassVar[str] = "arXiv 2602.05809"
    merges: ClassVar[bool] = True

    alpha: float = 3.0
    beta: float = 1.0
    rho: float = 0.9
    kappa: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "kappa"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must be above 0 and at most 1, got {self.rho}")

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens, the scanned ones refined; reports ``focus_tokens``."""
        phi = self._scores(features)  # (N,)
        order = descending_order(phi)
        held = phi[order].cumsum(dim=0)
        focus = ((held < self.rho * held[-1]).sum() + 1).clamp_max(keep)  # ()
        gram = cosine_gram(features.projected)
        picks = farthest_points(gram, order, focus, keep, from_given=True)  # (K,) focus first, then scan
        into = self._refine(gram, order, picks, focus)
        indices = picks.sort().values
        rows = merge_rows(features.projected, indices, into, phi)
        return Selection(indices, rows, report={"focus_tokens": focus})

    def _scores(self, features: VisionFeatures) -> Tensor:
        assert features.saliency is not None
        assert features.text is not None
        s = min_max(features.saliency)
        r = s
        if features.text.shape[0]:
            r = min_max(settled(cross_cosine(features.projected, features.text).mean(dim=1)))
        return r**self.alpha * s**self.beta

    def _refine(self, gram: Tensor, order: Tensor, picks: Tensor, focus: Tensor) -> Tensor:
        """Return the scan token each token is merged into, ``(N,)`` int64; -1 for none."""
        place = torch.arange(picks.shape[0], device=picks.device)
        anchor = settled(gram[:, picks]).masked_fill(place < focus, -torch.inf).argmax(dim=1)  # (N,)
        dropped = torch.ones_like(order).index_fill(0, picks, 0)
        turn = dropped[order].cumsum(dim=0) - 1  # the dropped tokens in order of phi, counted from 0
        count = (self.kappa * (picks.shape[0] - focus)).floor()
        joins = (dropped[order] == 1) & (turn < count)
        into = torch.where(joins, picks[anchor[order]], -1)
        return torch.empty_like(into).index_copy(0, order, into)
