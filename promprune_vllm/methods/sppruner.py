"""SPpruner, reconstructed: subjects first, then what stands around them.

Paper: "Focus-then-Context: Subject-Centric Progressive Visual Token Reduction for Vision-Language Models",
arXiv 2605.20950. **This is a reconstruction.** Neither the authors' code nor the text of the paper could be had;
what follows is built from the claims of the abstract, and no number of the paper may be expected of it.

Claims of the abstract that are rebuilt, and how:
* *Focus identification models the interplay of visual saliency and semantic relevance*: steps 1 and 2, with a
  product term ``g`` beside the weighted sum.
* *It also finds salient subjects the query does not name*: the sum lets either cue alone bring a token in.
* *Context-aware structural scanning of neighbouring regions*: step 4, ring by ring on the grid.
* *It aggregates contextual cues*: ``aggregate=True`` (step 6). Off by default: the selector then only drops.
* *Progressive reduction*: subjects, then rings, then the rest of the image, each within what is left.
Not rebuilt: stages inside the language model, if the paper has any, and its speed and accuracy.

1. Cues: ``s = minmax(saliency)``; ``r = minmax`` of the mean of a token's three largest cosines to the text, both
   sides centred on their means. No text (M = 0): ``r = s``. A single row of text is not centred.
2. Focus: ``f = w s + (1 - w) r + g s r``.
3. Subjects: the first k tokens by focus, k the fewest that hold 0.9 of the sum of f, within 0.25 K and 0.6 K. One
   with a cosine above 0.95 to a subject right beside, above or below it is skipped.
4. Context, ring R = 1, 2, ... 8: among the tokens at Chebyshev distance R from the subjects in the same frame,
   ``c_j = max_i cos(j, i) (1 - max_q cos(j, q))`` over subjects i and chosen tokens q other than i, negative
   cosines counted as 0. The best half of what is left of K (at least one token) is taken where c is above 0.
5. The places still left: a DPP over the remaining tokens, seeded by the token least similar to the chosen ones.
6. With ``aggregate``: every dropped token joins the most similar kept token within Chebyshev distance 2 of it if
   their cosine is above 0.6. Rows are means weighted by saliency.

Every formula and number above is ours: w = 0.5, g = 1, the three largest, 0.9, 0.25, 0.6, 0.95, 8 rings, halving,
the DPP, and 2 and 0.6 of step 6. Focus and cosines are compared in steps of 2**-32 and ties go to the lowest
index; NaN saliency counts as none; rows that are not finite resemble nobody.
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
    settled,
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
        aggregate: Merge dropped tokens into similar kept neighbours; the selection then carries ``rows``.
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
        focus = settled(self.w * s + (1 - self.w) * r + self.g * s * r)  # (N,)

        gram = settled(cosine_gram(features.projected)) * 2.0**-32  # equal tokens have equal cosines
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
    """Mean of each token's three largest cosines to a text of M >= 1 rows, scaled to [0, 1], ``(N,)``."""
    rows = _centred(text) if text.shape[0] > 1 else text
    cosines = cross_cosine(_centred(tokens), rows)  # (N, M)
    return min_max(settled(cosines.topk(min(3, text.shape[0]), dim=1).values.mean(dim=1)))


def find_subjects(focus: Tensor, twins: Tensor, keep: int) -> Tensor:
    """Return which tokens are subjects, ``(N,)`` bool.

    Args:
        focus: ``(N,)`` at least 0.
        twins: ``(N, N)`` bool: of these two, only the one with more focus can be a subject.
        keep: The whole budget.
    """
    least = math.ceil(FOCUS_SHARE[0] * keep)
    most = max(least, math.floor(FOCUS_SHARE[1] * keep))
    held = focus.sort(descending=True).values.cumsum(dim=0)
    count = ((held < FOCUS_MASS * held[-1]).sum() + 1).clamp(least, most)
    subjects = torch.zeros_like(twins[0])
    barred = torch.zeros_like(subjects)
    for t in range(most):
        pick = focus.masked_fill(barred, -1).argmax(dim=0, keepdim=True)  # (1,) the first of equal ones
        take = ~barred.index_select(0, pick) & (count > t)
        subjects = subjects.index_copy(0, pick, subjects.index_select(0, pick) | take)
        barred = (barred | (twins.index_select(0, pick).squeeze(0) & take)).index_fill(0, pick, True)
    return subjects


def scan_rings(gram: Tensor, near: Tensor, subjects: Tensor, keep: int, rings: int) -> Tensor:
    """Return subjects and their context, ``(N,)`` bool, at most ``keep`` tokens.

    Args:
        gram: ``(N, N)`` cosines.
        near: ``(N, N)`` distances on the grid.
        subjects: ``(N,)`` bool, at least one.
        keep: The whole budget.
        rings: How far to look.
    """
    ring = near.masked_fill(~subjects[None, :], _OTHER_FRAME).amin(dim=1)  # (N,) distance to the subjects
    cosines = gram.clamp_min(0)
    places = torch.arange(gram.shape[0], device=gram.device)
    chosen = subjects
    for distance in range(1, rings + 1):
        best = cosines.masked_fill(~chosen[None, :], 0).topk(2, dim=1).values  # (N, 2) to chosen tokens
        known = torch.where(cosines == best[:, :1], best[:, 1:], best[:, :1])  # (N, N) without the column's own
        cue = (cosines * (1 - known)).masked_fill(~subjects[None, :], 0).amax(dim=1)
        cue = cue.masked_fill((ring != distance) | chosen, 0)
        left = keep - chosen.sum()
        order = descending_order(cue)
        place = torch.empty_like(order).index_copy(0, order, places)
        chosen = chosen | ((place < (left // 2).clamp_min(1).minimum(left)) & (cue > 0))
    return chosen


def nearest_kept(similarity: Tensor, indices: Tensor) -> Tensor:
    """Return the kept token each dropped one joins, ``(N,)`` int64; -1 where none is similar enough.

    Args:
        similarity: ``(N, N)`` cosines, -inf for pairs that are too far apart.
        indices: ``(K,)`` int64, the kept tokens.
    """
    best, which = similarity[:, indices].max(dim=1)
    into = torch.where(best > MERGE_COSINE, indices[which], -1)
    return into.index_fill(0, indices, -1)


def grid_steps(grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns between every two tokens, ``(N, N)`` each; other frames are out of reach."""
    t, h, w = grid
    index = torch.arange(t * h * w, device=device)
    frame, row, column = index // (h * w), index // w % h, index % w
    apart = (frame[:, None] != frame[None, :]) * _OTHER_FRAME
    return (row[:, None] - row[None, :]).abs() + apart, (column[:, None] - column[None, :]).abs() + apart


def _centred(rows: Tensor) -> Tensor:
    """Subtract the mean row; what is left of a row that does not differ from it is rounding, and becomes 0."""
    x = finite_rows(rows)
    centred = x - x.mean(dim=0)
    scale = x.norm(dim=1, keepdim=True).amax()
    return centred.masked_fill_(centred.norm(dim=1, keepdim=True) <= 1e-9 * scale, 0)
