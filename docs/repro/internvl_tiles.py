"""vLLM 0.33: an InternVL in the layout of transformers counts one tile for an image that is cut into several.

``get_num_image_tokens`` (vllm/model_executor/models/interns1.py) does not know a default of the processor.

    python internvl_tiles.py [MODEL]     # exits with 1 where the counts differ; no weights are loaded
"""

from __future__ import annotations

import os
import sys

os.environ.update(VLLM_PLUGINS="")  # stock vLLM

import numpy as np
from PIL import Image
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

WIDTH, HEIGHT = 360, 220


def main(model: str) -> int:
    """Compare what vLLM counts with what the processor makes."""
    config = ModelConfig(model, dtype="float32", limit_mm_per_prompt={"image": 1, "video": 0})
    info = MULTIMODAL_REGISTRY.create_processor(config).info
    processor = info.get_hf_processor()
    counted = info.get_num_image_tokens(image_width=WIDTH, image_height=HEIGHT, processor=processor, mm_kwargs={})
    made = processor(images=[Image.new("RGB", (WIDTH, HEIGHT))], text=processor.image_token)["input_ids"][0]
    tokens = int((np.asarray(made) == processor.image_token_id).sum())
    each = processor.image_seq_length
    print(f"crop_to_patches of the image processor: {processor.image_processor.crop_to_patches}")
    print(f"tiles: vLLM counts {counted // each}, the processor makes {tokens // each}")
    print(f"tokens of the largest image, for the encoder's budget: {info.get_max_image_tokens()}")
    return int(counted != tokens)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "OpenGVLab/InternVL3-1B-hf"))
