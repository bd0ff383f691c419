"""PromPrune: spectral entropy splits the budget between salient and covering tokens.

Paper: "Balancing Saliency and Coverage: Semantic Prominence-Aware Budgeting for Visual Token Compression in
VLMs", arXiv 2603.14892. Checked against the authors' code (jayaylee/PromPrune 289ad46b47), which centers and
row-normalizes the features before the spectrum; the paper's Eq. 2-3 do neither. We follow the code, because
``mu = 0.42`` was tuned with it.

1. Entropy H: from the eigenvalues of the centered cosine Gram, normalized by ln min(N, D).
2. Split: ``k_sal = round(K * (kr_min + (kr_max - kr_min) * (1 - sigmoid((H - mu) / tau))))``. A spread-out
   image (high entropy) gets covering tokens, a concentrated one salient tokens. The paper's other two measures
   of H are options: the entropy of the features' norms and of the attention, each normalized by ln N. ``mu`` and
   ``tau`` are calibrated for the spectral entropy only; the others need their own.
3. Salient tokens: the ``k_sal`` with the most CLS attention.
4. Covering tokens: greedy MAP of a DPP over the rest, seeded by the token least similar to the salient ones. The
   paper's two alternatives are options: farthest-point sampling, with the same seed, and facility location.

Deviations, each where the reference is undefined or decided by rounding:
* Stage 2 tracks the explained volume from exactly 0 (see ``greedy_dpp``); the reference's argmax over
  ``1 - e**2`` is decided by float32 noise in its first steps. The two agree wherever the reference in float64
  is determined. All choices are made in float64; fast paths compute the entropy in float32 (see
  ``exact_entropy``).
* No token is ever chosen twice; once the volume is exhausted, the rest is filled by saliency. The reference
  repeats tokens in that case.
* Identical tokens have H = 1 without an eigen-solve; the reference crashes or returns noise.
* A token whose features are zero or not finite is a zero row: it adds nothing to any spectrum, covers nothing,
  and stage 2 takes it only to fill up. NaN saliency ranks last. In the entropies, a saliency that is negative or
  not finite and a norm that is not finite count as 0.
* Saliency is compared in float32 and ties go to the lowest index. The reference compares in float16 and leaves
  ties undefined.
* Kept tokens stay in raster order. The reference returns the salient tokens, then the covering ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import (
    Cosines,
    batches,
    cosines,
    descending_order,
    facility_location,
    farthest_points,
    share_entropy,
)

Entropy = Literal["spectral", "feature_norm", "attention"]
Coverage = Literal["dpp", "fps", "facility_location"]


@register
@dataclass(frozen=True, slots=True)
class PromPrune:
    """Salient and covering tokens, in a proportion that depends on the image.

    Args:
        mu: Entropy at which the budget is split evenly (0.42: the authors' calibration for CLIP towers).
        tau: Width of the transition, above 0.
        kr_min: Smallest salient share of the budget. ``kr_min = kr_max`` fixes the share: 1 is saliency only,
            0 is coverage only.
        kr_max: Largest salient share of the budget.
        entropy: What H measures: ``spectral``, ``feature_norm`` or ``attention``.
        coverage: How stage 2 covers the rest: ``dpp``, ``fps`` or ``facility_location``.
        exact_entropy: Compute the spectral entropy from float64 eigenvalues on every device. The fast paths are
            accurate to 1e-5, which rarely moves one token of the budget; on CUDA the exact solver makes the host
            wait.
        fps_from_salient: Farthest-point sampling keeps away from the salient tokens at every step; by default
            they only seed it. Needs ``coverage="fps"``.
    """

    name: ClassVar[str] = "promprune"
    needs: ClassVar[Need] = Need.PROJECTED | Need.SALIENCY
    paper: ClassVar[str] = "arXiv 2603.14892"
    merges: ClassVar[bool] = False

    mu: float = 0.42
    tau: float = 0.02
    kr_min: float = 0.0
    kr_max: float = 1.0
    entropy: Entropy = "spectral"
    coverage: Coverage = "dpp"
    fps_from_salient: bool = False
    exact_entropy: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.kr_min <= self.kr_max <= 1:
            raise ValueError(f"kr must satisfy 0 <= kr_min <= kr_max <= 1, got {self.kr_min} and {self.kr_max}")
        if not (math.isfinite(self.mu) and math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"mu must be finite, and tau finite and above 0, got {self.mu} and {self.tau}")
        if self.entropy not in get_args(Entropy):
            raise ValueError(f"entropy must be one of {', '.join(get_args(Entropy))}, got {self.entropy!r}")
        if self.coverage not in get_args(Coverage):
            raise ValueError(f"coverage must be one of {', '.join(get_args(Coverage))}, got {self.coverage!r}")
        if self.fps_from_salient is not False and (self.fps_from_salient is not True or self.coverage != "fps"):
            raise ValueError(
                f"fps_from_salient must be False, or True with coverage='fps', got {self.fps_from_salient!r} "
                f"with coverage={self.coverage!r}"
            )
        if self.exact_entropy not in (True, False) or (self.exact_entropy and self.entropy != "spectral"):
            raise ValueError(
                f"exact_entropy must be False, or True with entropy='spectral', got {self.exact_entropy!r} "
                f"with entropy={self.entropy!r}"
            )

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens; reports ``saliency_tokens`` and the entropy by name, as ``spectral_entropy``."""
        return self._select_batch([features], [keep])[0]

    def select_many(self, groups: Sequence[VisionFeatures], keeps: Sequence[int]) -> list[Selection]:
        """Select from each group as ``select`` does: the same tokens, with fewer launches on CUDA."""
        selections: dict[int, Selection] = {}
        for batch in batches([group.projected for group in groups]):
            results = self._select_batch([groups[i] for i in batch], [keeps[i] for i in batch])
            selections |= zip(batch, results, strict=True)
        return [selections[i] for i in range(len(groups))]

    def entropy_of(self, features: VisionFeatures) -> Tensor:
        """Return H of a group, 0-d float64 in [0, 1], which decides how its budget is split."""
        return self.entropies([features], cosines([features.projected]))[0]

    def _select_batch(self, groups: Sequence[VisionFeatures], keeps: Sequence[int]) -> list[Selection]:
        similarity = cosines([group.projected for group in groups])  # one Gram for the entropy and the coverage
        entropies = self.entropies(groups, similarity)
        salient = [self.salient_count(entropy, keep) for entropy, keep in zip(entropies, keeps, strict=True)]
        orders = [descending_order(group.saliency) for group in groups if group.saliency is not None]  # (N,) each
        picks = self._cover(similarity, orders, salient, keeps)
        return [
            Selection(tokens.sort().values, report={f"{self.entropy}_entropy": entropy, "saliency_tokens": count})
            for tokens, entropy, count in zip(picks, entropies, salient, strict=True)
        ]

    def salient_count(self, entropy: Tensor, keep: int | Tensor) -> Tensor:
        """Return how many of ``keep`` tokens are salient ones at an entropy, 0-d int64 from 0 to ``keep``."""
        z = ((entropy - self.mu) / self.tau).clamp(-20, 20)
        share = self.kr_min + (self.kr_max - self.kr_min) * (1 - torch.sigmoid(z))
        return (share * keep).round().to(torch.int64)  # half to even, like the reference

    def entropies(self, groups: Sequence[VisionFeatures], similarity: Cosines) -> list[Tensor]:
        """Return H of each group, 0-d float64, given their cosines."""
        preset = [group.entropy for group in groups if group.entropy is not None]
        if len(preset) == len(groups):
            return preset
        if self.entropy == "spectral":
            entropies = similarity.entropies(exact=self.exact_entropy)
        elif self.entropy == "feature_norm":
            entropies = [share_entropy(group.projected.double().norm(dim=1)) for group in groups]
        else:
            entropies = [share_entropy(group.saliency) for group in groups if group.saliency is not None]
        return [
            computed if group.entropy is None else group.entropy
            for group, computed in zip(groups, entropies, strict=True)
        ]

    def _cover(
        self, similarity: Cosines, orders: Sequence[Tensor], salient: Sequence[Tensor], keeps: Sequence[int]
    ) -> list[Tensor]:
        if self.coverage == "dpp":
            return similarity.greedy_dpp(orders, salient, keeps)
        cover = facility_location
        if self.coverage == "fps":
            cover = partial(farthest_points, from_given=self.fps_from_salient)
        return [cover(*each) for each in zip(similarity.matrices(), orders, salient, keeps, strict=True)]
