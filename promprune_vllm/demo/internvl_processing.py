"""Input processing of the InternVL demo models: special tokens, chat templates, processors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from promprune_vllm.demo.processing import FIRST_BYTE_ID, byte_tokenizer, chatml

# Same roles and ids as in `processing`: pad, begin, end, image.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>")
IMAGE_START_ID, IMAGE_END_ID, VIDEO_ID = range(FIRST_BYTE_ID + 256, FIRST_BYTE_ID + 259)
_AROUND = {"start_image_token": "<img>", "end_image_token": "</img>"}
# A frame of a video: one token that stands for all of it before the processor, or each of its visual tokens.
MORE_TOKENS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "internvl": MappingProxyType({**_AROUND, "video_token": "<video>"}),
        "internvl_chat": MappingProxyType({**_AROUND, "video_token": "<|video_pad|>"}),
    }
)
"""Special tokens behind the bytes, by attribute name on the tokenizer, by ``model_type``."""

CHAT_TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "internvl": chatml(r"<IMG_CONTEXT>\n", r"<video>\n"),
        "internvl_chat": chatml(r"<image>\n", r"<video>\n"),  # plain text, which vLLM replaces
    }
)
"""Jinja sources, by ``model_type``."""

_MEAN, _DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, as published


def internvl_tokenizer(model_type: str, *, max_tokens: int) -> Any:
    """Return the tokenizer of a model type, a key of ``CHAT_TEMPLATES``, for texts of ``max_tokens``."""
    return byte_tokenizer(
        max_tokens,
        special=SPECIAL_TOKENS,
        more=MORE_TOKENS[model_type],
        chat_template=CHAT_TEMPLATES[model_type],
        image_name="context_image_token",
    )


def internvl_processor(tile_px: int, tile_tokens: int, max_tiles: int, *, max_tokens: int) -> Any:
    """Return an ``InternVLProcessor`` that cuts an image into tiles and adds the whole image as one more.

    Args:
        tile_px: Width and height of a tile in pixels.
        tile_tokens: Visual tokens of a tile.
        max_tiles: Maximum number of tiles of an image, without the whole one.
        max_tokens: Maximum length of a prompt in tokens.
    """
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    side = {"height": tile_px, "width": tile_px}
    look: dict[str, Any] = {"size": side, "image_mean": _MEAN, "image_std": _DEVIATION}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(crop_to_patches=True, max_patches=max_tiles, **look),
        tokenizer=internvl_tokenizer("internvl", max_tokens=max_tokens),
        video_processor=InternVLVideoProcessor(**look),
        image_seq_length=tile_tokens,
        chat_template=CHAT_TEMPLATES["internvl"],
    )


def tile_preprocessing(tile_px: int) -> Any:
    """Return what InternVLChat checkpoints have for transformers: it prepares one tile; vLLM does not read it."""
    from transformers import CLIPImageProcessor

    side = {"height": tile_px, "width": tile_px}
    return CLIPImageProcessor(
        size={"shortest_edge": tile_px}, crop_size=side, image_mean=_MEAN, image_std=_DEVIATION
    )
