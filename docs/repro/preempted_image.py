"""vLLM 0.33: a preempted request whose image was in the prefix cache ends the engine.

The caches are emptied by hand here, by the scheduler's own methods. A server gets there with few blocks of KV
cache and images that are used more than once.

    python preempted_image.py [MODEL]     # a LLaVA-1.5; a CPU and random weights are enough; exits with 1 where
                                          # the engine ends
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")  # stock vLLM, where its objects can be seen
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from PIL import Image
from vllm import LLM, SamplingParams

PROMPT = "USER: <image>\n" + "What is it? " * 40 + "ASSISTANT:"  # fills blocks behind the image


def preempt(llm: LLM) -> None:
    """Do to the running request what the scheduler does when it is out of blocks; others then use what it had."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    (request,) = scheduler.running
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic())
    llm.reset_prefix_cache()


def main(model: str) -> int:
    """Ask twice about an image, the second time with a preemption behind the first step."""
    llm = LLM(
        model,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        limit_mm_per_prompt={"image": 1},
    )
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    prompt: Any = {"prompt": PROMPT, "multi_modal_data": {"image": Image.new("RGB", (336, 336))}}
    llm.generate([prompt], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
    llm.llm_engine.add_request("again", prompt, sampling)
    llm.llm_engine.step()
    preempt(llm)
    try:
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    except RuntimeError as error:
        print(f"{type(error).__name__}: {str(error).split(' for ')[0]}")
        return 1
    print("answered")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "llava-hf/llava-1.5-7b-hf"))
