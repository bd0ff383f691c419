"""vLLM 0.33: an image whose first request never reached the engine is sent without its pixels the next time.

Both ends of vLLM's cache are here: the API server's, which leaves out what the engine has, and the engine's.

    python unsent_image.py [MODEL]     # a Qwen2.5-VL; no weights are loaded; exits with 1 where it is missing
"""

from __future__ import annotations

import os
import sys

os.environ.update(VLLM_PLUGINS="")  # stock vLLM

from PIL import Image
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache.lru import LruKeyReplicatedReceiverCache, LruKeyReplicatedSenderCache
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

PROMPT = "<|vision_start|><|image_pad|><|vision_end|>What is it?"


def main(model: str) -> int:
    """Process a request that is refused for its length, and then one with the same image."""
    config = ModelConfig(model, dtype="float32", limit_mm_per_prompt={"image": 1, "video": 0})
    sender, receiver = LruKeyReplicatedSenderCache(config), LruKeyReplicatedReceiverCache(config)
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    items = processor.info.parse_mm_data({"image": [Image.new("RGB", (224, 224))]})
    ids = processor.info.get_tokenizer().encode(PROMPT)
    for name in ("refused, so not sent", "sent"):
        inputs = ProcessorInputs(ids, items, cache=sender)
        prompt = processor.apply(inputs, TimingContext(enabled=False))
        (item,), (identifier,) = prompt["mm_kwargs"]["image"], prompt["mm_hashes"]["image"]
        print(f"{name}: {'without' if item is None else 'with'} pixels")
    try:
        receiver.get_and_update_item(item, identifier)
    except Exception as error:
        print(f"the engine: {type(error).__name__}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-VL-3B-Instruct"))
