"""SPpruner, reconstructed: subjects first, then their surroundings.

Paper: "Focus-then-Context: Subject-Centric Progressive Visual Token Reduction for Vision-Language Models",
arXiv 2605.20950. **This is a reconstruction.** Neither the authors' code nor the text of the paper was available;
it is built from the claims of the abstract and cannot be expected to reach the paper's numbers.

Claims of the abstract that are reconstructed, and how:
* *Focus identification models the interplay of visual saliency and semantic relevance*: steps 1 and 2, with a
  product term ``g`` beside the weighted sum.
* *It also finds salient subjects the query does not name*: with the sum, either cue alone can select a token.
* *Context-aware structural scanning of neighbouring regions*: step 4, ring by ring on the grid.
* *It aggregates contextual cues*: ``aggregate=True`` (step 6). Off by default: then tokens are only dropped.
* *Progressive reduction*: subjects, then rings, then the rest of the image, each within the budget left.
Not reconstructed: stages inside the language model, if the paper has any, and its speed and accuracy.

1. Cues: ``s = minmax(saliency)``; ``r = minmax`` of the mean of a token's three largest cosines to the text, both
   sides centered on their means. Without text (M = 0), ``r = s``. A single row of text is not centered.
2. Focus: ``f = w s + (1 - w) r + g s r``.
3. Subjects: the first k tokens by focus, where k is the fewest that hold 0.9 of the sum of f, between 0.25 K and
   0.6 K. A token with a cosine above 0.95 to a subject directly beside, above or below it is skipped.
4. Context, ring R = 1, 2, ... 8: among the tokens at Chebyshev distance R from the subjects in the same frame,
   ``c_j = max_i cos(j, i) (1 - max_q cos(j, q))`` over subjects i and chosen tokens q other than i, negative
   cosines counted as 0. The best tokens with c above 0 are taken, up to half of what is left of K (at least one).
5. The rest of K: a DPP over the remaining tokens, seeded by the token least similar to the chosen ones.
6. With ``aggregate``: every dropped token is merged into the most similar kept token within Chebyshev distance 2
   if their cosine is above 0.6. Rows are means weighted by saliency.

Every formula and number above is ours: w = 0.5, g = 1, the three largest, 0.9, 0.25, 0.6, 0.95, 8 rings, halving,
the DPP, and 2 and 0.6 in step 6. Focus and cosines are compared in steps of 2**-32 and ties go to the lowest
index; NaN saliency counts as 0; rows that are not finite are similar to no other row.
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
    finite_rows,
    greedy_dpp,
    merge_rows,
    min_max,
    quantized,
)

FOCUS_MASS = 0.9
FOCUS_SHARE = (0.25, 0.6)
TWIN_COSINE = 0.95
RINGS = 8
MERGE_COSINE = 0.6
MERGE_REACH = 2
_OTHER_FRAME = 1 << 20


@register
@dataclass(frozen=True, slots=True)
class SPpruner:
    """Subjects by saliency and relevance, then their surroundings, then the rest of the image.

    Args:
        w: Weight of saliency against relevance, 0 to 1.
        g: Weight of their product, at least 0.
        aggregate: Merge dropped tokens into similar kept neighbors; the selection then has ``rows``.
    """

    name: ClassVar[str] = "sppruner"
    needs: ClassVar[Need] = Need.PROJECTED | Need.SALIENCY | Need.TEXT
    paper: ClassVar[str] = "arXiv 2605.20950 (reconstruction from the abstract)"
    merges: ClassVar[bool] = False

    w: float = 0.5
    g: float = 1.0
    aggregate: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.w <= 1:
            raise ValueError(f"w must be between 0 and 1, got {self.w}")
        if not (math.isfinite(self.g) and self.g >= 0):
            raise ValueError(f"g must be finite and at least 0, got {self.g}")
        if not isinstance(self.aggregate, bool):
            raise ValueError(f"aggregate must be True or False, got {self.aggregate!r}")

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens; reports ``focus_tokens`` and ``context_tokens``."""
        assert features.saliency is not None
        assert features.text is not None
        s = min_max(features.saliency)
        r = text_relevance(features.projected, features.text) if features.text.shape[0] else s
        focus = quantized(self.w * s + (1 - self.w) * r + self.g * s * r)  # (N,)

        gram = quantized(cosine_gram(features.projected)) * 2.0**-32  # equal tokens have equal cosines
        rows, columns = grid_steps(features.grid, gram.device)
        near = torch.maximum(rows, columns)  # (N, N) Chebyshev distance
        subjects = find_subjects(focus, (rows + columns == 1) & (gram > TWIN_COSINE), keep)
        chosen = scan_rings(gram, near, subjects, keep, min(RINGS, max(features.grid[1:]) - 1))
        by_focus = descending_order(focus)
        order = by_focus[torch.argsort(chosen[by_focus].long(), descending=True, stable=True)]
        indices = greedy_dpp(gram, order, chosen.sum(), keep).sort().values

        report = {"focus_tokens": subjects.sum(), "context_tokens": (chosen & ~subjects).sum()}
        if not self.aggregate:
            return Selection(indices, report=report)
        into = nearest_kept(gram.masked_fill(near > MERGE_REACH, -torch.inf), indices)
        weight = torch.where(features.saliency.isfinite(), features.saliency, 0).clamp_min(0)
        return Selection(indices, merge_rows(features.projected, indices, into, weight), report=report)


def text_relevance(tokens: Tensor, text: Tensor) -> Tensor:
    """Return the mean of each token's three largest cosines to M >= 1 rows of text, scaled to [0, 1], ``(N,)``."""
    rows = _center(text) if text.shape[0] > 1 else text
    cosines = cross_cosine(_center(tokens), rows)  # (N, M)
    return min_max(quantized(cosines.topk(min(3, text.shape[0]), dim=1).values.mean(dim=1)))


def find_subjects(focus: Tensor, twins: Tensor, keep: int) -> Tensor:
    """Return which tokens are subjects, ``(N,)`` bool.

    Args:
        focus: ``(N,)`` at least 0.
        twins: ``(N, N)`` bool: pairs of which only the token with more focus can be a subject.
        keep: The whole budget.
    """
    least = math.ceil(FOCUS_SHARE[0] * keep)
    most = max(least, math.floor(FOCUS_SHARE[1] * keep))
    mass = focus.sort(descending=True).values.cumsum(dim=0)
    count = ((mass < FOCUS_MASS * mass[-1]).sum() + 1).clamp(least, most)
    subjects = torch.zeros_like(twins[0])
    excluded = torch.zeros_like(subjects)
    for t in range(most):
        pick = focus.masked_fill(excluded, -1).argmax(dim=0, keepdim=True)  # (1,) ties: the lowest index
        take = ~excluded.index_select(0, pick) & (count > t)
        subjects = subjects.index_copy(0, pick, subjects.index_select(0, pick) | take)
        excluded = (excluded | (twins.index_select(0, pick).squeeze(0) & take)).index_fill(0, pick, True)
    return subjects


def scan_rings(gram: Tensor, near: Tensor, subjects: Tensor, keep: int, rings: int) -> Tensor:
    """Return the subjects and their context, ``(N,)`` bool, at most ``keep`` tokens.

    Args:
        gram: ``(N, N)`` cosines.
        near: ``(N, N)`` distances on the grid.
        subjects: ``(N,)`` bool, at least one.
        keep: The whole budget.
        rings: Number of rings to scan.
    """
    ring = near.masked_fill(~subjects[None, :], _OTHER_FRAME).amin(dim=1)  # (N,) distance to the subjects
    cosines = gram.clamp_min(0)
    ranks = torch.arange(gram.shape[0], device=gram.device)
    chosen = subjects
    for distance in range(1, rings + 1):
        best = cosines.masked_fill(~chosen[None, :], 0).topk(2, dim=1).values  # (N, 2) to chosen tokens
        others = torch.where(cosines == best[:, :1], best[:, 1:], best[:, :1])  # (N, N) to chosen tokens but i
        cue = (cosines * (1 - others)).masked_fill(~subjects[None, :], 0).amax(dim=1)
        cue = cue.masked_fill((ring != distance) | chosen, 0)
        left = keep - chosen.sum()
        order = descending_order(cue)
        rank = torch.empty_like(order).index_copy(0, order, ranks)
        chosen = chosen | ((rank < (left // 2).clamp_min(1).minimum(left)) & (cue > 0))
    return chosen


def nearest_kept(similarity: Tensor, indices: Tensor) -> Tensor:
    """Return the kept token each dropped one is merged into, ``(N,)`` int64; -1 if none is similar enough.

    Args:
        similarity: ``(N, N)`` cosines, -inf for pairs that are too far apart.
        indices: ``(K,)`` int64, the kept tokens.
    """
    best, number = similarity[:, indices].max(dim=1)
    into = torch.where(best > MERGE_COSINE, indices[number], -1)
    return into.index_fill(0, indices, -1)


def grid_steps(grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the distance of every two tokens in rows and in columns, ``(N, N)`` each; huge across frames."""
    t, h, w = grid
    index = torch.arange(t * h * w, device=device)
    frame, row, column = index // (h * w), index // w % h, index % w
    penalty = (frame[:, None] != frame[None, :]) * _OTHER_FRAME
    return (row[:, None] - row[None, :]).abs() + penalty, (column[:, None] - column[None, :]).abs() + penalty


def _center(rows: Tensor) -> Tensor:
    """Subtract the mean row. Rows equal to it become exactly 0, without rounding noise."""
    x = finite_rows(rows)
    centered = x - x.mean(dim=0)
    scale = x.norm(dim=1, keepdim=True).amax()
    return centered.masked_fill_(centered.norm(dim=1, keepdim=True) <= 1e-9 * scale, 0)
