"""PromPrune: spectral entropy splits the budget between salient and covering tokens.

Paper: "Semantic Prominence-Aware Budgeting", arXiv 2603.14892. Read against the authors' code
(jayaylee/PromPrune 289ad46b47), which centres and row-normalises the features before the spectrum; the
paper's Eq. 2-3 do neither. We follow the code, because ``mu = 0.42`` was tuned with it.

1. Entropy: eigenvalues of the centred cosine Gram, normalised by ln min(N, D).
2. Split: ``k_sal = round(K * (kr_min + (kr_max - kr_min) * (1 - sigmoid((H - mu) / tau))))``. A spread-out
   image (high entropy) gets covering tokens, a concentrated one salient tokens.
3. Salient tokens: the ``k_sal`` with the most CLS attention.
4. Covering tokens: greedy MAP of a DPP over the rest, seeded by the token least similar to the salient ones.

Deviations, each where the reference is undefined or decided by rounding:
* Stage 2 tracks the explained volume from exactly 0 (see ``greedy_dpp``); the reference's argmax over
  ``1 - e**2`` is decided by float32 noise in its first steps. The two agree wherever the reference in float64
  is determined. Everything is computed in float64.
* No token is ever chosen twice; when the volume is exhausted, the rest is filled by saliency. The reference
  repeats tokens there.
* Tokens that do not differ at all have H = 1 without an eigen-solve; the reference crashes or returns noise.
* Saliency ties go to the lowest index, in float32. The reference leaves them open, in float16.
* Kept tokens stay in raster order. The reference hands them over as salient ++ covering.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import cosine_gram, greedy_dpp, spectral_entropy


@register
@dataclass(frozen=True, slots=True)
class PromPrune:
    """Salient and covering tokens, in a proportion the image itself decides.

    Args:
        mu: Entropy at which the budget is split evenly (0.42: the authors' calibration for CLIP towers).
        tau: Width of the transition, above 0.
        kr_min: Smallest salient share of the budget. ``kr_min = kr_max`` fixes the share: 1 is saliency only,
            0 is coverage only.
        kr_max: Largest salient share of the budget.
    """

    name: ClassVar[str] = "promprune"
    needs: ClassVar[Need] = Need.PROJECTED | Need.SALIENCY
    paper: ClassVar[str] = "arXiv 2603.14892"

    mu: float = 0.42
    tau: float = 0.02
    kr_min: float = 0.0
    kr_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.kr_min <= self.kr_max <= 1:
            raise ValueError(f"0 <= kr_min <= kr_max <= 1 is needed, got {self.kr_min} and {self.kr_max}")
        if not (math.isfinite(self.mu) and math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"mu must be finite and tau finite and above 0, got {self.mu} and {self.tau}")

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens; reports ``spectral_entropy`` and ``saliency_tokens``."""
        assert features.saliency is not None
        gram = cosine_gram(features.projected)  # (N, N)
        entropy = spectral_entropy(features.projected)  # ()
        z = ((entropy - self.mu) / self.tau).clamp(-20, 20)
        share = self.kr_min + (self.kr_max - self.kr_min) * (1 - torch.sigmoid(z))
        salient = (share * keep).round().clamp(0, keep).to(torch.int64)  # half to even, as the reference
        saliency = features.saliency.to(gram.dtype)
        order = torch.argsort(saliency, descending=True, stable=True)  # (N,) equal ones: lowest index first
        picks = greedy_dpp(gram, order, salient, keep)
        report = {"spectral_entropy": entropy, "saliency_tokens": salient}
        return Selection(picks.sort().values, report=report)
