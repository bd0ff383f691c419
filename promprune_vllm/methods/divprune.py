"""DivPrune: the tokens that are farthest apart.

Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175. Implemented
from its formulas: max-min diversity with the distance ``d(i, j) = 1 - cos(f_i, f_j)`` of projected tokens.

1. First token: the one whose nearest other token is farthest, ``argmax_i min_{j != i} d(i, j)``.
2. Next token: ``argmax_i min_{s in S} d(i, s)`` over the tokens i not yet in S, until K are chosen.

Deviations, each where the authors' code (vbdi/divprune 799e2d950a) is undefined or decided by rounding:
* A chosen token is masked. The reference relies on its distance to itself being exactly 0, which rounding breaks,
  and repeats tokens if only duplicates are left.
* Distances are float64, compared in steps of 2**-32; ties go to the lowest index. The reference computes in the
  model's dtype.
* K tokens per image instead of a ratio, and never a newline embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import cosine_gram, max_min_select


@register
@dataclass(frozen=True, slots=True)
class DivPrune:
    """The most diverse tokens: greedy max-min cosine distance, regardless of attention."""

    name: ClassVar[str] = "divprune"
    needs: ClassVar[Need] = Need.PROJECTED
    paper: ClassVar[str] = "arXiv 2503.02175"
    merges: ClassVar[bool] = False

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens, each far from its nearest kept neighbor."""
        picks = max_min_select(cosine_gram(features.projected), keep)
        return Selection(picks.sort().values)
