"""vLLM 0.33: text after a pruned video gets other positions if the video is in the prefix cache.

``get_mrope_input_positions`` counts a video with all its tokens. ``recompute_mrope_positions`` corrects that, but
only in a step that gathers embeddings of the video. If all of it is in the prefix cache, no step does.

    python mrope_prefix_cache.py [MODEL]     # a Qwen2.5-VL; a CPU and random weights are enough; exits with 1
                                             # where the positions differ
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")  # stock vLLM, where its objects can be seen
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
from vllm import LLM, SamplingParams

FRAMES = 8
METADATA = {
    "fps": 2.0,
    "duration": FRAMES / 2,
    "total_num_frames": FRAMES,
    "frames_indices": list(range(FRAMES)),
    "do_sample_frames": False,
}
PROMPT = "<|vision_start|><|video_pad|><|vision_end|>" + "What happens in it? " * 40  # fills a block behind it


def watch_positions(llm: LLM) -> list[int]:
    """Return a list that grows by the position of the last token of each step."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    runner.is_multimodal_pruning_enabled = True  # as GPUModelRunner.load_model does; CPUModelRunner's forgets it
    forward, last = runner.model.forward, []

    def watching(input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        last.append(int(positions[0].max()))
        return forward(input_ids, positions, *args, **kwargs)

    runner.model.forward = watching
    return last


def main(model: str) -> int:
    """Ask the same twice."""
    llm = LLM(
        model,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        video_pruning_rate=0.75,
        limit_mm_per_prompt={"image": 0, "video": 1},
    )
    last = watch_positions(llm)
    video = np.random.default_rng(0).integers(0, 256, (FRAMES, 112, 112, 3), dtype=np.uint8)
    prompt: Any = {"prompt": PROMPT, "multi_modal_data": {"video": (video, METADATA)}}
    found = []
    for name in ("first", "from the prefix cache"):
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
        found.append(last[-1])
        print(f"{name}: {output.num_cached_tokens} tokens cached, the last token is at {found[-1]}")
    return int(found[0] != found[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-VL-3B-Instruct"))
