"""vLLM 0.33: positions of a pruned video above 256 are rounded, in bfloat16.

A pruned video's rows carry their positions in extra columns of the embeddings, which have the model's type
(``_postprocess_video_embeds_evs`` in vllm/model_executor/models/qwen2_5_vl.py; Qwen3-VL does the same). bfloat16
holds every integer up to 256, above that every second one, above 512 every fourth.

    python mrope_bfloat16.py     # a CPU is enough; exits with 1 where positions change
"""

from __future__ import annotations

import os
import sys

os.environ.update(VLLM_PLUGINS="")  # stock vLLM

import torch
from vllm.multimodal.video_prune.evs import compute_mrope_for_media, recompute_mrope_positions

START, IMAGE, VIDEO = 1, 2, 3
FRAMES, SIDE, TOKENS_PER_SECOND = 300, 2, 2  # five minutes at two frames a second: a pair of frames each second


def recomputed(dtype: torch.dtype) -> torch.Tensor:
    """Return the times of the video's tokens, sent in rows of a type as the model does; nothing is dropped."""
    positions = compute_mrope_for_media(torch.tensor([FRAMES, SIDE, SIDE]), 1, TOKENS_PER_SECOND, 1.0)
    rows = torch.cat([torch.zeros(len(positions), 8, dtype=dtype), positions], dim=1)
    sent = rows[:, -4:].permute(1, 0).long()  # as Qwen2_5_VLForConditionalGeneration.recompute_mrope_positions
    ids = torch.tensor([0, START] + [VIDEO] * len(positions))
    before = torch.arange(len(ids)).expand(3, -1)
    found, _ = recompute_mrope_positions(ids, [sent], before, 0, START, IMAGE, VIDEO)
    return found[0, 2:]


def main() -> int:
    """Compare bfloat16 with float32."""
    expected, found = (recomputed(dtype) for dtype in (torch.float32, torch.bfloat16))
    wrong = int((expected != found).sum())
    print(f"float32:  the last frames are at {expected.unique().tolist()[-4:]}")
    print(f"bfloat16: the last frames are at {found.unique().tolist()[-4:]}; {wrong} of {len(found)} tokens moved")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
