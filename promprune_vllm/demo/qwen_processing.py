"""Input processing of the Qwen-VL demo models: special tokens, chat template, processors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from promprune_vllm.demo.processing import FIRST_BYTE_ID, byte_level_tokenizer, byte_tokenizer, chatml

# Same roles and ids as in `processing`: pad, begin, end, image.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
MORE_TOKENS: Mapping[str, str] = MappingProxyType(
    {
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
)
VIDEO_ID, VISION_START_ID, VISION_END_ID = range(FIRST_BYTE_ID + 256, FIRST_BYTE_ID + 259)

CHAT_TEMPLATE = chatml(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
)

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "qwen2_vl": "Qwen2VL",
        "qwen2_5_vl": "Qwen2_5_VL",
        "qwen3_vl": "Qwen3VL",
        "qwen3_vl_moe": "Qwen3VLMoe",
        "qwen3_5": "Qwen3_5",
        "qwen3_5_moe": "Qwen3_5Moe",
    }
)
"""Prefix of the transformers class names, by ``model_type``."""

# Limits of visual tokens per image, and per whole video, so that several photos fit into a short context.
_MIN_TOKENS, _MAX_TOKENS = 4, 256


def qwen_processor(model_type: str, patch_px: int, merge: int, *, max_tokens: int) -> Any:
    """Return the processor of a model type.

    Args:
        model_type: As in config.json, a key of ``CLASSES``.
        patch_px: Width and height of a patch in pixels.
        merge: Patches per visual token along each axis.
        max_tokens: Maximum length of a prompt in tokens.
    """
    import transformers

    is_qwen3 = model_type.startswith("qwen3")  # one processor for dense models and experts
    videos = "Qwen3VLVideoProcessor" if is_qwen3 else "Qwen2VLVideoProcessor"
    geometry: dict[str, Any] = {"patch_size": patch_px, "merge_size": merge, "temporal_patch_size": 2}
    if is_qwen3:  # normalized to [-1, 1]; the others keep the default, CLIP's mean and deviation
        geometry |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    token_px = (patch_px * merge) ** 2
    size = {"shortest_edge": _MIN_TOKENS * token_px, "longest_edge": _MAX_TOKENS * token_px}  # areas, in pixels
    make = byte_level_tokenizer if model_type.startswith("qwen3_5") else byte_tokenizer
    tokenizer = make(max_tokens, special=SPECIAL_TOKENS, more=MORE_TOKENS, chat_template=CHAT_TEMPLATE)
    processor = "Qwen3VLProcessor" if is_qwen3 else f"{CLASSES[model_type]}Processor"
    return getattr(transformers, processor)(
        image_processor=transformers.Qwen2VLImageProcessor(size=size, **geometry),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, videos)(size=size, **geometry),
        chat_template=CHAT_TEMPLATE,
    )
