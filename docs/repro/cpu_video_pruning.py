"""vLLM 0.33: with ``--video-pruning-rate``, the first video ends an engine on a CPU.

Rows of a pruned video carry their positions in extra columns. The runner takes these off only where
``is_multimodal_pruning_enabled`` is set, and ``CPUModelRunner.load_model`` does not set it.

    python cpu_video_pruning.py [MODEL]     # a Qwen2.5-VL; random weights are enough; exits with 1 where it fails
"""

from __future__ import annotations

import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")  # stock vLLM, and its own exception
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


def main(model: str) -> int:
    """Ask about one video."""
    llm = LLM(
        model,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        video_pruning_rate=0.5,
        limit_mm_per_prompt={"image": 0, "video": 1},
    )
    video = np.random.default_rng(0).integers(0, 256, (FRAMES, 112, 112, 3), dtype=np.uint8)
    prompt = {
        "prompt": "<|vision_start|><|video_pad|><|vision_end|>What happens?",
        "multi_modal_data": {"video": (video, METADATA)},
    }
    try:
        llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return 1
    print("answered")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-VL-3B-Instruct"))
