"""FSR (Focus-Scan-Refine): tokens the question is about, tokens most unlike them, and details merged into those.

Paper: "Focus-Scan-Refine: From Human Visual Perception to Efficient Visual Token Pruning", arXiv 2602.05809.
Implemented from notes on its formulas. No code had been published then, so the merging weights of step 4 are our
interpretation. It is the published method closest to SPpruner.

1. Score: ``phi = minmax(r)**alpha * minmax(s)**beta`` with saliency s and relevance to the text r.
2. Focus F: the fewest tokens, by descending phi, that hold the share rho of the sum of phi; at most K.
3. Scan S: farthest-point sampling of the other ``K - |F|`` tokens, away from F and from each other.
4. Refine: the ``M = floor(kappa |S|)`` dropped tokens with the highest phi are merged into the scan token most
   similar to them. Its row becomes the mean of its members, weighted by phi. Rows of F are unchanged.

Deviations:
* The paper takes r from CLIP's text tower, which language models do not load. Here r is the mean cosine of the
  projected token to the language model's embeddings of the text. Without text (M = 0 rows), ``r = s``.
* Cosines that differ by less than 2**-32 are equal, and the lowest index wins. Tokens at most 1e-5 from the set
  are taken last, by phi.
* NaN saliency gives the lowest score; rows that are not finite are similar to no other row.
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
    quantized,
)


@register
@dataclass(frozen=True, slots=True)
class FSR:
    """Tokens relevant to the text, context unlike them, and details merged into the context.

    Args:
        alpha: Exponent of the relevance, at least 0.
        beta: Exponent of the saliency, at least 0.
        rho: Share of the total score that the focus holds, above 0 and at most 1.
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
        """Keep ``keep`` tokens, with dropped ones merged into the scan tokens; reports ``focus_tokens``."""
        phi = self._scores(features)  # (N,)
        order = descending_order(phi)
        mass = phi[order].cumsum(dim=0)
        focus = ((mass < self.rho * mass[-1]).sum() + 1).clamp_max(keep)  # ()
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
            r = min_max(quantized(cross_cosine(features.projected, features.text).mean(dim=1)))
        return r**self.alpha * s**self.beta

    def _refine(self, gram: Tensor, order: Tensor, picks: Tensor, focus: Tensor) -> Tensor:
        """Return the scan token each token is merged into, ``(N,)`` int64; -1 for none."""
        number = torch.arange(picks.shape[0], device=picks.device)
        anchor = quantized(gram[:, picks]).masked_fill(number < focus, -torch.inf).argmax(dim=1)  # (N,)
        dropped = torch.ones_like(order).index_fill(0, picks, 0)
        rank = dropped[order].cumsum(dim=0) - 1  # rank of each dropped token by phi, from 0
        count = (self.kappa * (picks.shape[0] - focus)).floor()
        is_merged = (dropped[order] == 1) & (rank < count)
        into = torch.where(is_merged, picks[anchor[order]], -1)
        return torch.empty_like(into).index_copy(0, order, into)
