"""PromPrune for clips: frames share the budget by what is new in them, and PromPrune's stages select what is new.

Ours. The paper (arXiv 2603.14892) is about images; from it are the two stages and their split by spectral
entropy (see ``promprune``, which selects from a clip of a single frame). The rest is after how video is coded:
what can be predicted from what was already seen costs little.

1. Known: a token's largest cosine to the tokens of at most 3 x 3 cells around its own, in the frames 1, 2, 4
   and 8 before. Near cells, since a camera moves; several frames, since what an object covered for a moment is
   not new when it leaves. ``novelty = 1 - known``, from 0 to 1; all of the first frame is new.
2. Worth of a token, for its frame's share: the novelty, where the neighbors to the left and above in the same
   frame count as known too. A plain wall is worth little even if it is new. The worth of a frame is the root
   of the sum of squares: noise and slow movement, small but everywhere, count for little, and a frame with
   something small that is new gets more than its area.
3. Quota of a frame: its part of the frames' worth times ``K (1 - even)``, plus an equal part of ``K even``; no
   more than it has tokens, by largest remainder. What a full frame cannot take goes to the others in
   proportion.
4. In each frame, PromPrune: ``k_sal`` tokens by saliency times weight, then a DPP over the rest with the
   weights as quality. A token's weight is its novelty, but at least ``KNOWN``. As in ``promprune``, the first
   covering token after salient ones is the one least similar to them, and here too whatever its weight.

Cost grows linearly with the number of frames: cosines within one frame, and of single rows of cells to rows of
other frames. Nothing waits for the device: quotas stay on it. A DPP is greedy, so its first q choices do not
depend on how many follow: all frames choose as many tokens as any could get, and keep their first q. On a CPU,
where the quotas can be read, each frame chooses just q.

Novelty is computed from float32 cosines in steps of 2**-12, whatever the type of the features, and summed
exactly. A token that is zero or not finite has none.

The rules and constants were chosen on drawn clips of the split "train": tokens are compared with more than their
own cell for a panning camera, with more than the frame before for what an object covered, and a frame's worth
has the root so that events keep more of their tokens. docs/results.md has other clips, eight of each kind, 16
frames of 12 x 12 tokens. There, of K = N / 32, the first frame gets 90% if nothing happens, 79% with one object
that appears, 52% with several, and 35% if the camera pans by less than half a patch per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import batches, cosines, descending_order, unit_rows
from promprune_vllm.methods.promprune import PromPrune

BACK = (1, 2, 4, 8)
"""How many frames back a frame looks for what it shows."""
KNOWN = 0.01
"""Weight of a token that earlier frames show."""
_STEPS = 2.0**12


@register
@dataclass(frozen=True, slots=True)
class PromPruneVideo:
    """More tokens for frames that show something new; of each, the salient and covering tokens that are new.

    Args:
        mu, tau, kr_min, kr_max: As in ``promprune``, whose calibration for a model this method uses.
        even: Share of the budget that frames get alike, whatever they show.
    """

    name: ClassVar[str] = "promprune-video"
    needs: ClassVar[Need] = Need.PROJECTED | Need.SALIENCY
    paper: ClassVar[str] = "ours, after arXiv 2603.14892"
    merges: ClassVar[bool] = False
    over_frames: ClassVar[bool] = True
    calibrated_as: ClassVar[str] = "promprune"

    mu: float = 0.42
    tau: float = 0.02
    kr_min: float = 0.0
    kr_max: float = 1.0
    even: float = 0.1

    def __post_init__(self) -> None:
        _ = self._stages
        if not 0 <= self.even <= 1:
            raise ValueError(f"even must be from 0 to 1, got {self.even}")

    @property
    def _stages(self) -> PromPrune:
        return PromPrune(self.mu, self.tau, self.kr_min, self.kr_max)

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` of N tokens of any frames; reports ``saliency_tokens``, and the frames' mean entropy."""
        count, rows, columns = features.grid
        if count == 1:
            return self._stages.select(features, keep)
        size = rows * columns
        novelty, worth = novelties(features)  # (T, P), (T,)
        total = worth.sum()
        share = torch.where(total > 0, worth / total.clamp_min(1 / _STEPS), 1 / count)
        quotas = split(self.even / count + (1 - self.even) * share, size, keep)  # (T,)
        most = quotas.clamp_max(size - 1).tolist() if quotas.is_cpu else [min(keep, size - 1)] * count
        ranks, salient, entropies = self._rank(features.frames(), novelty.clamp_min(KNOWN), quotas, most)
        dropped = (ranks >= quotas[:, None]).flatten()
        tokens = torch.arange(features.tokens, device=dropped.device).masked_fill(dropped, features.tokens)
        report = {"saliency_tokens": salient.sum(), "spectral_entropy": entropies.mean()}
        return Selection(tokens.sort().values[:keep], report=report)

    def _rank(
        self, frames: Sequence[VisionFeatures], weights: Tensor, quotas: Tensor, most: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's place in its frame's choice, ``(T, P)``, salient tokens and H, ``(T,)`` each.

        ``most``: How many tokens of each frame to choose, at least its quota or all but one. The others are last.
        """
        ranks = torch.full_like(weights, weights.shape[1] - 1, dtype=torch.int64)
        salient, entropy = torch.zeros_like(quotas), torch.ones_like(weights[:, 0])
        if not any(most):  # frames of one token
            return ranks, salient, entropy
        for batch in batches([frame.projected for frame in frames]):
            groups = [frames[t] for t in batch]
            similarity = cosines([group.projected for group in groups])
            entropies = self._stages.entropies(groups, similarity)
            given = [self._stages.salient_count(h, quotas[t]) for t, h in zip(batch, entropies, strict=True)]
            saliency = [group.saliency for group in groups if group.saliency is not None]
            orders = [descending_order(each * weights[t]) for t, each in zip(batch, saliency, strict=True)]
            keeps = [most[t] for t in batch]
            given_kept = [count.clamp_max(keep) for count, keep in zip(given, keeps, strict=True)]
            picks = [order[:0] for order in orders]
            if any(keeps):
                picks = similarity.greedy_dpp(orders, given_kept, keeps, [weights[t] for t in batch])
            for t, h, count, chosen in zip(batch, entropies, given, picks, strict=True):
                ranks[t].scatter_(0, chosen, torch.arange(len(chosen), device=chosen.device))
                salient[t], entropy[t] = count, h
        return ranks, salient, entropy


def novelties(features: VisionFeatures) -> tuple[Tensor, Tensor]:
    """Return how new each token of a clip is, and what each frame is worth.

    Args:
        features: ``(N, D)`` tokens of T frames with P tokens each.

    Returns:
        ``(T, P)`` float64 from 0 to 1, where all of the first frame is new; and ``(T,)`` float64, at least 0.
    """
    frames, rows, columns = features.grid
    # A frame at a time: rows of length 1 are computed in float64.
    clip = torch.stack([unit_rows(frame.projected).float() for frame in features.frames()])
    clip = clip.reshape(frames, rows, columns, -1)  # (T, h, w, D)
    empty = (clip == 0).all(dim=-1).flatten(1)
    known = clip.new_full((frames, rows, columns), -torch.inf)
    for back in BACK:
        for up in (-1, 0, 1):
            _look(known, clip, back=back, up=up, reach=(-1, 1))
    novelty = _novelty(known).masked_fill(empty, 0)
    _look(known, clip, back=0, up=1, reach=(-1, 1))
    _look(known, clip, back=0, up=0, reach=(-1, -1))
    return novelty, _novelty(known).masked_fill(empty, 0).square().sum(dim=1).sqrt()


def split(shares: Tensor, size: int, keep: int) -> Tensor:
    """Split a budget over frames in proportion, where no frame can take more than it has.

    Args:
        shares: ``(T,)`` float64, at least 0.
        size: Tokens of each frame.
        keep: Tokens to keep in all, fewer than ``T * size``.

    Returns:
        ``(T,)`` int64 from 0 to ``size``, summing to ``keep``; of equal remainders, the earlier is rounded up.
    """
    shares = shares + 1e-9  # where all frames with a share are full, the others take the rest alike
    descending = shares.sort(descending=True).values
    below = descending.flip(0).cumsum(dim=0).flip(0)  # (T,) share of this frame and all with less
    full = torch.arange(len(shares), device=shares.device)
    level = (keep - size * full) / below  # (T,) tokens per share if so many frames are full
    fits = (level * descending <= size).int().argmax(dim=0, keepdim=True)  # the fewest full frames that suffice
    exact = (level[fits] * shares).clamp_max(size)
    quotas = exact.floor().long()
    place = (exact - quotas).argsort(descending=True, stable=True).argsort()
    return quotas + (place < keep - quotas.sum())


def _novelty(known: Tensor) -> Tensor:
    """Return ``1 - known`` of ``(T, h, w)`` cosines, in whole steps, ``(T, P)`` float64."""
    return ((1 - known.double()).clamp(0, 1) * _STEPS).round().flatten(1) / _STEPS


def _look(known: Tensor, clip: Tensor, *, back: int, up: int, reach: tuple[int, int]) -> None:
    """Raise ``known`` to the largest cosine to some cells of an earlier frame, or of the same.

    Args:
        known: ``(T, h, w)``, written to.
        clip: ``(T, h, w, D)`` tokens of length 1.
        back: How many frames back.
        up: How many rows above the token's own.
        reach: The first and the last column, counted from the token's own.
    """
    frames, rows, columns, _ = clip.shape
    if back >= frames or abs(up) >= rows:
        return
    here, there = slice(max(up, 0), rows + min(up, 0)), slice(max(-up, 0), rows - max(up, 0))
    cosine = clip[back:, here] @ clip[: frames - back, there].transpose(-1, -2)  # (T', h', w, w)
    column = torch.arange(columns, device=clip.device)
    offset = column[None, :] - column[:, None]
    cosine = cosine.masked_fill((offset < reach[0]) | (offset > reach[1]), -torch.inf)
    known[back:, here] = torch.maximum(known[back:, here], cosine.amax(dim=-1))
