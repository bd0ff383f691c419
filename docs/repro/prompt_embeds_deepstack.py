"""vLLM 0.33: with ``--enable-prompt-embeds``, one request with embeddings and an image ends a Qwen3-VL engine.

Embeddings in a chat message take the way of an image that is already encoded. Rows of a Qwen3-VL's images are
wider than the model: behind each come its rows for the first layers (DeepStack). Those of the message are as wide
as the model, and ``_compute_deepstack_embeds`` joins both.

    python prompt_embeds_deepstack.py [MODEL]     # a Qwen3-VL; a CPU and random weights are enough; exits with 1
                                                  # where the engine ends
"""

from __future__ import annotations

import base64
import io
import os
import sys
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")  # stock vLLM, and its own exception
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from PIL import Image
from vllm import LLM, SamplingParams


def embeddings(width: int) -> dict[str, Any]:
    """Return a part of a message with five embeddings."""
    file = io.BytesIO()
    torch.save(torch.zeros(5, width), file)
    return {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}


def main(model: str) -> int:
    """Send messages with one of the two, and with both."""
    llm = LLM(
        model,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        enable_prompt_embeds=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    text = {"type": "text", "text": "What is it?"}
    image = {"type": "image_pil", "image_pil": Image.new("RGB", (96, 96))}
    embedded = embeddings(llm.model_config.get_hidden_size())
    failed = False
    for name, parts in {
        "embeddings": [embedded, text],
        "an image": [image, text],
        "embeddings and an image": [embedded, image, text],
    }.items():
        try:
            (output,) = llm.chat(
                [{"role": "user", "content": parts}], SamplingParams(max_tokens=3), use_tqdm=False
            )
            print(f"{name}: {len(output.outputs[0].token_ids)} tokens")
        except RuntimeError as error:
            failed = True
            print(f"{name}: {type(error).__name__}: {str(error).split('.')[0]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen3-VL-2B-Instruct"))
