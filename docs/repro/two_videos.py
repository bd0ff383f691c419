"""vLLM 0.33: two videos with different numbers of frames in one step end a LLaVA-OneVision engine.

``_process_video_pixels`` (vllm/model_executor/models/llava_onevision.py) then returns rows with three dimensions.

    python two_videos.py [MODEL]     # a LLaVA-OneVision; a CPU and random weights are enough; exits with 1 where
                                     # the engine ends
"""

from __future__ import annotations

import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")  # stock vLLM, and its own exception
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
from vllm import LLM, SamplingParams


def main(model: str) -> int:
    """Ask about two equally long videos, and about two of different lengths."""
    llm = LLM(
        model,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        limit_mm_per_prompt={"image": 0, "video": 2},
    )
    failed = False
    for lengths in ((3, 3), (2, 7)):
        noise = np.random.default_rng(0)
        videos = [noise.integers(0, 256, (length, 112, 112, 3), dtype=np.uint8) for length in lengths]
        prompt = {"prompt": "<video><video>What happens?", "multi_modal_data": {"video": videos}}
        try:
            llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
            print(f"{lengths[0]} and {lengths[1]} frames: answered")
        except Exception as error:
            failed = True
            message = str(error).split(", but")[0]
            print(f"{lengths[0]} and {lengths[1]} frames: {type(error).__name__}: {message}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"))
