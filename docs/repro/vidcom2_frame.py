"""vLLM 0.33: ``--video-pruning-method vidcom2`` can drop the only token that a frame keeps.

``compute_retention_mask`` (vllm/multimodal/video_prune/vidcom2.py) gives every frame at least one token. If the
frames' numbers then add up to more than the total, it drops the most redundant tokens, whatever their frame.

    python vidcom2_frame.py     # a CPU is enough; exits with 1 where a frame keeps nothing
"""

from __future__ import annotations

import os
import sys

os.environ.update(VLLM_PLUGINS="")  # stock vLLM

import torch
from vllm.multimodal.video_prune.vidcom2 import compute_retention_mask

FRAMES, SIDE = 8, 4


def clip() -> torch.Tensor:
    """Return ``(T * H * W, D)`` embeddings: one frame is unlike the rest, which are nearly alike."""
    noise = torch.Generator().manual_seed(0)
    frames = torch.randn(1, SIDE * SIDE, 64, generator=noise) * 0.1 + torch.randn(1, 1, 64, generator=noise)
    frames = frames + 0.01 * torch.randn(FRAMES, SIDE * SIDE, 64, generator=noise)
    frames[5] = torch.randn(SIDE * SIDE, 64, generator=noise)
    return frames.flatten(0, 1)


def main() -> int:
    """Count what each frame keeps at several rates."""
    empty = 0
    for rate in (0.5, 0.9, 0.93):
        kept = compute_retention_mask(clip(), (FRAMES, SIDE, SIDE), 1, rate).view(FRAMES, -1).sum(1).tolist()
        empty += 0 in kept
        print(f"rate {rate}: {sum(kept)} of {FRAMES * SIDE * SIDE} tokens, by frame {kept}")
    return int(empty > 0)


if __name__ == "__main__":
    sys.exit(main())
