"""VisPruner: important tokens by attention, diverse ones by removing look-alikes round after round.

Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
arXiv 2412.01818v2. Read against the authors' code (Theia-4869/VisPruner aefa01adc7).

1. Important half: the ``floor(r K)`` tokens with the most CLS attention.
2. The list L: all other tokens, in descending order of attention.
3. While L is longer than the ``K - floor(r K)`` places left: A = even positions of L, B = odd ones, on tokens as
   the tower gives them, before the projector. A token of A scores its largest cosine to a token of B; the (at
   most 8) highest scores are removed. L becomes what is left of A, by descending score, followed by B.

Deviations:
* A list of odd length gives A the extra token; the reference then fails (N = 576 with K = 66 and r = 1/2).
* Never more tokens are removed in a round than A holds, so any K works.
* Cosines are float64, compared in steps of 2**-32, and equal ones keep the order of L; float16 and open in the
  reference. The rounds are chaotic: a relative noise of 1e-6 changes about half of the diverse tokens, while
  how well they cover the image stays the same to 0.001.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import cosine_gram, descending_order, settled

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
        diverse = _without_look_alikes(features.encoder, order[important:], keep - important)
        return Selection(torch.cat([order[:important], diverse]).sort().values)


def _without_look_alikes(encoder: Tensor, remaining: Tensor, places: int) -> Tensor:
    """Return ``places`` tokens of the list ``remaining``; its order decides who is compared with whom."""
    if places == 0:
        return remaining[:0]
    gram = settled(cosine_gram(encoder))
    while (surplus := remaining.shape[0] - places) > 0:
        even, odd = remaining[0::2], remaining[1::2]
        score = gram[even[:, None], odd[None, :]].amax(dim=1)  # (|A|,)
        ranked = even[torch.argsort(score, descending=True, stable=True)]
        removed = min(_PER_ROUND, surplus, even.shape[0])
        remaining = torch.cat([ranked[removed:], odd])
    return remaining
