"""vLLM 0.33: with ``--video-pruning-rate`` a step encodes several times what the encoder's budget allows.

The scheduler charges a step's encoder budget with ``get_num_embeds()``: the tokens a video has *after* pruning.
The tower computes all of them. Here the same short videos are asked about at once, unpruned and at a rate of 0.75,
and the tokens that go through the tower in a step are counted.

    python encoder_budget.py [MODEL]     # a Qwen2.5-VL; a CPU and random weights are enough; exits with 1 where
                                         # a step encodes more than its budget
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")  # stock vLLM, where its objects can be seen
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
from vllm import LLM, SamplingParams

PROMPT = "<|vision_start|><|video_pad|><|vision_end|>What happens?"
VIDEOS, FRAMES, SIDE = 24, 8, 224
STEP_TOKENS = 1024
METADATA = {
    "fps": 2.0,
    "duration": FRAMES / 2,
    "total_num_frames": FRAMES,
    "frames_indices": list(range(FRAMES)),
    "do_sample_frames": False,
}


def encoded_in_each_step(llm: LLM) -> list[int]:
    """Return a list that grows by the tokens the tower computes in each step which encodes anything."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    runner.is_multimodal_pruning_enabled = llm.model_config.multimodal_config.is_multimodal_pruning_enabled()
    # ^ GPUModelRunner.load_model does this; CPUModelRunner.load_model forgets it, and pruning fails on a CPU.
    tower, execute_model = runner.model.visual, runner.execute_model
    forward, steps = tower.forward, [0]

    def counting(x: Any, grid_thw: Any) -> Any:
        steps[-1] += sum(int(np.prod(grid)) for grid in grid_thw) // tower.spatial_merge_size**2
        return forward(x, grid_thw)

    def stepping(*args: Any, **kwargs: Any) -> Any:
        if steps[-1]:
            steps.append(0)
        return execute_model(*args, **kwargs)

    tower.forward, runner.execute_model = counting, stepping
    return steps


def largest_step(model: str, rate: float) -> tuple[int, int]:
    """Return the budget of a step, and the most tokens that one has encoded."""
    llm = LLM(
        model,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=VIDEOS,
        max_num_batched_tokens=STEP_TOKENS,
        video_pruning_rate=rate,
        limit_mm_per_prompt={"image": 0, "video": 1},
    )
    steps = encoded_in_each_step(llm)
    noise = np.random.default_rng(0)
    videos = noise.integers(0, 256, (VIDEOS, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    prompts = [{"prompt": PROMPT, "multi_modal_data": {"video": (video, METADATA)}} for video in videos]
    llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    return llm.llm_engine.engine_core.engine_core.scheduler.max_num_encoder_input_tokens, max(steps)


def main() -> int:
    """Compare unpruned videos with pruned ones."""
    model = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-VL-3B-Instruct"
    wrong = 0
    for rate in (0.0, 0.75):
        budget, encoded = largest_step(model, rate)
        wrong += encoded > budget
        print(f"rate {rate}: a step may encode {budget} tokens, the largest encoded {encoded}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
