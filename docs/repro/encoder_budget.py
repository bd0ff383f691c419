"""vLLM 0.32: pruned media are charged to the encoder by what is left of them, though the tower sees all of them.

The scheduler fills a step's encoder budget with ``get_num_embeds()`` of each medium, the count *after* pruning.
The vision tower runs on every patch. So with a pruning rate of 0.75, four times the tokens that the memory profile
allowed for reach the tower in one step. On a GPU the runner sidesteps it by encoding pruned videos one at a time
(see the TODO in ``gpu_model_runner.py``), which gives up batching; other runners, and pruning of images, have no
such guard.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_PLUGINS="", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1"
)

import numpy as np
from vllm import LLM, SamplingParams

from promprune_vllm.demo.families import build_family_model

BUDGET, VIDEOS, RATE = 192, 4, 0.75


def main() -> int:
    """Print what one step sends through the tower, and what it was allowed to."""
    with tempfile.TemporaryDirectory() as scratch:
        model = build_family_model("qwen2_5_vl", Path(scratch) / "model")
        llm = LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=BUDGET,
            video_pruning_rate=RATE,
            limit_mm_per_prompt={"image": 0, "video": VIDEOS},
        )
        runner: Any = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        tower, seen = runner.model.visual, []
        merge = tower.spatial_merge_size**2

        def note(_: Any, inputs: tuple[Any, ...]) -> None:
            seen.append(len(inputs[0]) // merge)

        handle = tower.register_forward_pre_hook(note)
        videos = [np.random.default_rng(i).integers(0, 255, (4, 168, 168, 3), np.uint8) for i in range(VIDEOS)]
        asked = [
            {"prompt": "<|vision_start|><|video_pad|><|vision_end|>?", "multi_modal_data": {"video": [video]}}
            for video in videos
        ]
        llm.generate(asked, SamplingParams(max_tokens=1), use_tqdm=False)
        handle.remove()
    print(f"encoder budget of a step: {BUDGET} tokens; calls of the tower: {seen} tokens")
    return int(max(seen) > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
