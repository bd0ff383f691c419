"""VidCom2: more tokens for the frames of a video that are unlike the rest.

Paper: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", arXiv
2505.14454. The reference is vLLM's ``compute_retention_mask`` in ``multimodal/video_prune/vidcom2.py`` (0.32.0),
adapted from the authors' code.

1. Columns: the half of the features' columns that vary least over the video; of them, tokens of length 1.
2. Redundancy of a token: its likeness to the mean token of the video plus that to the mean token of its frame. The
   likeness is a sum of five Gaussians of the distance, ``exp(-d^2 / 2a)`` with a from 1/8 to 2.
3. Quota of a frame: ``K / N`` of its tokens, times 1 plus what it has of a softmax (temperature 0.01) over the
   frames' unlikeness to the video, minus the mean of that; rounded, from 1 to all.
4. Each frame keeps its least redundant tokens. Where the quotas do not sum to K, the most redundant of these are
   dropped, or the least redundant of the others added, whatever their frame.

For any K of at least one token per frame, the tokens are those that vLLM keeps at the rate ``q = 1 - K / N``. vLLM
rounds N (1 - q) down to K, but takes q itself for the quotas: where N (1 - q) is not a whole number, a quota can
be rounded differently here, and then some tokens differ. As in vLLM, step 4 can drop the only token of a frame.

It is computed in the type of the features, as vLLM does. Ties go to the lowest index, where vLLM leaves them to
``torch.topk``. In bfloat16 many tokens tie, and of these the two can keep different ones.

Deviation: K below one token per frame, which vLLM's formula cannot give, follows from the same steps: of the
frames' least redundant tokens, the K least redundant ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection

_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
_TEMPERATURE = 0.01


@register
@dataclass(frozen=True, slots=True)
class VidCom2:
    """The least redundant tokens of every frame, and more of frames unlike the rest of the video."""

    name: ClassVar[str] = "vidcom2"
    needs: ClassVar[Need] = Need.PROJECTED
    paper: ClassVar[str] = "arXiv 2505.14454"
    merges: ClassVar[bool] = False
    over_frames: ClassVar[bool] = True

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens: the least redundant of each frame, as many as its quota allows."""
        to_video, to_frame = likeness(features)
        redundancy = to_video + to_frame  # (T, P)
        quotas = _quotas(to_video, keep / features.tokens)
        place = redundancy.argsort(dim=1, stable=True).argsort(dim=1)  # of each token within its frame
        beyond = (place >= quotas[:, None]).flatten()
        # Those within the quotas first, and the least redundant first: the first K are what step 4 leaves.
        order = redundancy.flatten().argsort(stable=True)
        order = order[beyond[order].byte().argsort(stable=True)]
        return Selection(order[:keep].sort().values)


def likeness(features: VisionFeatures) -> tuple[Tensor, Tensor]:
    """Return how much tokens are like the mean token of their video, and of their frame: ``(T, P)``, 0 to 5."""
    frames, rows, columns = features.grid
    clip = _steady_columns(features.projected).reshape(frames, rows * columns, -1)
    clip = normalize(clip, dim=-1)  # (T, P, C)
    return _gaussians(clip, clip.mean(dim=(0, 1), keepdim=True)), _gaussians(clip, clip.mean(dim=1, keepdim=True))


def _steady_columns(tokens: Tensor) -> Tensor:
    """Return the half of the columns of ``(N, D)`` tokens that vary least, the steadiest first."""
    variance = tokens.var(dim=0, unbiased=False)
    return tokens.index_select(1, variance.topk(max(1, tokens.shape[1] // 2), largest=False).indices)


def _gaussians(clip: Tensor, mean: Tensor) -> Tensor:
    """Return the sum of Gaussians of the distance of ``(T, P, C)`` tokens to a mean token, ``(T, P)``."""
    squared = ((clip - mean) ** 2).sum(dim=-1)
    # One by one: in bfloat16 the rounding of each partial sum decides between tokens.
    return reduce(torch.add, (torch.exp(-squared / (2 * width)) for width in _WIDTHS))


def _quotas(to_video: Tensor, share: float) -> Tensor:
    """Return how many tokens each frame keeps if all together keep a share, ``(T,)`` int64 from 1 to P."""
    unlike = -to_video.mean(dim=1)
    weights = torch.softmax((unlike - unlike.max()) / _TEMPERATURE, dim=0)
    shares = (share * (1 + weights - weights.mean())).clamp(max=1)
    size = to_video.shape[1]
    return (shares * size).round().long().clamp(min=1, max=size)
