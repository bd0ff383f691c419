"""EVS: the first frame of a video, and what changes after it.

Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624.
The reference is vLLM's ``compute_retention_mask`` in ``multimodal/video_prune/evs.py`` (0.32.0), which compares
embeddings where the paper describes pixels. For any K of at least one frame, it keeps the same tokens.

1. The first frame is kept whole.
2. A later token's change is ``1 - cos`` to the token at the same place one frame earlier.
3. The tokens that change most, over all frames together, fill the rest of K. A frame in which nothing changes may
   keep none.

It is computed in the type of the features, as vLLM does: in bfloat16 many changes are equal, and another type
would keep other tokens. Ties go to the earliest frame, then to raster order. If all frames are equal, every change
is 0 or a rounding error.

Deviations:
* K below one frame, which vLLM's formula cannot give: evenly spaced tokens of the first frame.
* A token that is not a number counts as unchanged; vLLM keeps it before the first frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import cosine_similarity

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import descending_order
from promprune_vllm.methods.controls import evenly_spaced


@register
@dataclass(frozen=True, slots=True)
class EVS:
    """The first frame of a video whole, then the tokens that differ most from the frame before."""

    name: ClassVar[str] = "evs"
    needs: ClassVar[Need] = Need.PROJECTED
    paper: ClassVar[str] = "arXiv 2510.14624"
    merges: ClassVar[bool] = False
    over_frames: ClassVar[bool] = True

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep the first frame, or part of it, and the ``keep - h * w`` tokens that change most."""
        tokens, (frames, rows, columns) = features.projected, features.grid
        first = min(keep, rows * columns)
        anchor = evenly_spaced(first, rows * columns, tokens.device)
        if first == keep:
            return Selection(anchor)
        clip = tokens.reshape(frames, rows * columns, -1)  # (T, P, D)
        change = 1 - cosine_similarity(clip[1:], clip[:-1], dim=-1)  # (T - 1, P)
        changed = descending_order(change.flatten())[: keep - first] + first
        return Selection(torch.cat([anchor, changed.sort().values]))
