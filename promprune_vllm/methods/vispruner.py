"""VisPruner: important tokens by attention, diverse tokens by removing near-duplicates round by round.

Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
arXiv 2412.01818v2. Checked against the authors' code (Theia-4869/VisPruner aefa01adc7).

1. Important tokens: the ``floor(r K)`` with the most CLS attention.
2. The list L: all other tokens, in descending order of attention.
3. While L is longer than the remaining budget ``K - floor(r K)``: A = even positions of L, B = odd positions, on
   the tower's output tokens, before the projector. A token in A scores its largest cosine to a token in B; the
   (at most 8) highest scores are removed. L becomes the rest of A, by descending score, followed by B.

Deviations:
* If L has odd length, A gets the extra token; the reference fails in that case (N = 576 with K = 66 and r = 1/2).
* A round never removes more tokens than A has, so any K works.
* Cosines are float64, compared in steps of 2**-32, and ties keep the order of L. The reference uses float16 and
  leaves ties undefined. The rounds are chaotic: a relative noise of 1e-6 changes about half of the diverse tokens,
  while their coverage of the image stays the same to 0.001.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import cosine_gram, descending_order, quantized

_PER_ROUND = 8


@register
@dataclass(frozen=True, slots=True)
class VisPruner:
    """Half the budget to the most attended tokens, half to the least redundant of the rest.

    Args:
        r: Share of the budget for the important tokens, from 0 to 1.
    """

    name: ClassVar[str] = "vispruner"
    needs: ClassVar[Need] = Need.ENCODER | Need.SALIENCY
    paper: ClassVar[str] = "arXiv 2412.01818v2"
    merges: ClassVar[bool] = False

    r: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.r <= 1:
            raise ValueError(f"r must be from 0 to 1, got {self.r}")

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens: important ones, then diverse ones."""
        assert features.encoder is not None
        assert features.saliency is not None
        order = descending_order(features.saliency)  # (N,)
        important = int(keep * self.r)
        diverse = _remove_near_duplicates(features.encoder, order[important:], keep - important)
        return Selection(torch.cat([order[:important], diverse]).sort().values)


def _remove_near_duplicates(encoder: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Return ``count`` of the tokens; their order decides which are compared with each other."""
    if count == 0:
        return tokens[:0]
    gram = quantized(cosine_gram(encoder))
    while (surplus := tokens.shape[0] - count) > 0:
        even, odd = tokens[0::2], tokens[1::2]
        score = gram[even[:, None], odd[None, :]].amax(dim=1)  # (|A|,)
        by_score = even[torch.argsort(score, descending=True, stable=True)]
        removed = min(_PER_ROUND, surplus, even.shape[0])
        tokens = torch.cat([by_score[removed:], odd])
    return tokens
