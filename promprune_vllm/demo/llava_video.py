"""Tiny checkpoints of the LLaVAs that take videos: LLaVA-OneVision and LLaVA-NeXT-Video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from promprune_vllm.demo import model, processing
from promprune_vllm.demo.processing import FIRST_BYTE_ID, byte_tokenizer, chatml
from promprune_vllm.demo.random_weights import DType

# An odd number of patches, as in the published checkpoints: a frame's 5 x 5 become 3 x 3.
_ONEVISION_PX, _ONEVISION_PATCH_PX, _MAX_TILES = 70, 14, 4
# vLLM's pooler divides by the side in pixels over the pixels of a patch, rounded down.
_NEXT_PX, _NEXT_PATCH_PX, _POOL = 64, 8, 2
VIDEO_ID = FIRST_BYTE_ID + 256
_TOWER: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
)
# Qwen2's names of the same roles: pad, begin, end, image.
_ONEVISION_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
CHAT_TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "llava_onevision": chatml(r"<image>\n", r"<video>\n"),
        "llava_next_video": processing.CHAT_FRAME.replace(
            processing.IMAGES_OPEN,
            """\
    {%- for part in message['content'] %}
      {%- if part['type'] in ('image', 'image_url') %}{{- '<image>\\n' }}
      {%- elif part['type'] in ('video', 'video_url') %}{{- '<video>\\n' }}
      {%- endif %}
    {%- endfor %}""",
        ),
    }
)
"""Jinja sources, by ``model_type``."""


def build_onevision(directory: Path, seed: int, dtype: DType) -> Path:
    """Write a LLaVA-OneVision: a SigLIP tower, tiles of 25 tokens, frames of 9."""
    sides = range(_ONEVISION_PX, (_MAX_TILES + 1) * _ONEVISION_PX, _ONEVISION_PX)
    grids = [[height, width] for height in sides for width in sides]
    tokens = (_ONEVISION_PX // _ONEVISION_PATCH_PX) ** 2
    vision = {**_TOWER, "image_size": _ONEVISION_PX, "patch_size": _ONEVISION_PATCH_PX}

    def write(target: Path) -> None:
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            Qwen2Config,
            SiglipVisionConfig,
        )

        config = LlavaOnevisionConfig(
            architectures=["LlavaOnevisionForConditionalGeneration"],
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
            text_config=Qwen2Config(**_text(), dtype=dtype),
            image_token_index=processing.IMAGE_ID,
            video_token_index=VIDEO_ID,
            image_grid_pinpoints=grids,
            dtype=dtype,
        )
        model.write_weights(target, LlavaOnevisionForConditionalGeneration, config, seed, dtype)
        _onevision_processor(grids, tokens).save_pretrained(target)

    contents = {"seed": seed, "dtype": dtype, "vision": vision, "text": _text(), "grids": grids}
    return model.publish(directory, model.stamp("llava_onevision", contents), write)


def build_next_video(directory: Path, seed: int, dtype: DType) -> Path:
    """Write a LLaVA-NeXT-Video: a CLIP tower, frames of 16 tokens."""
    vision = {**_TOWER, "image_size": _NEXT_PX, "patch_size": _NEXT_PATCH_PX}

    def write(target: Path) -> None:
        from transformers import (
            CLIPVisionConfig,
            LlamaConfig,
            LlavaNextVideoConfig,
            LlavaNextVideoForConditionalGeneration,
        )

        config = LlavaNextVideoConfig(
            architectures=["LlavaNextVideoForConditionalGeneration"],
            vision_config=CLIPVisionConfig(**vision),
            text_config=LlamaConfig(**_text(), dtype=dtype),
            image_token_index=processing.IMAGE_ID,
            video_token_index=VIDEO_ID,
            image_grid_pinpoints=[[_NEXT_PX, _NEXT_PX]],
            spatial_pool_stride=_POOL,
            dtype=dtype,
        )
        model.write_weights(target, LlavaNextVideoForConditionalGeneration, config, seed, dtype)
        _next_video_processor().save_pretrained(target)

    contents = {"seed": seed, "dtype": dtype, "vision": vision, "text": _text(), "pool": _POOL}
    return model.publish(directory, model.stamp("llava_next_video", contents), write)


def _text() -> dict[str, Any]:
    return {
        **model.TINY_TEXT,
        **processing.ROLE_IDS,
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }


def _tokenizer(model_type: str, special: tuple[str, ...]) -> Any:
    return byte_tokenizer(
        model.TINY_TEXT["max_position_embeddings"],
        special=special,
        more={"video_token": "<video>"},
        chat_template=CHAT_TEMPLATES[model_type],
    )


def _onevision_processor(grids: list[list[int]], tokens: int) -> Any:
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    look: dict[str, Any] = {
        "size": {"height": _ONEVISION_PX, "width": _ONEVISION_PX},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=grids, **look),
        tokenizer=_tokenizer("llava_onevision", _ONEVISION_TOKENS),
        video_processor=LlavaOnevisionVideoProcessor(**look),
        num_image_tokens=tokens,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATES["llava_onevision"],
    )


def _next_video_processor() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    side = {"height": _NEXT_PX, "width": _NEXT_PX}
    look: dict[str, Any] = {"size": {"shortest_edge": _NEXT_PX}, "crop_size": side}
    return LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=[[_NEXT_PX, _NEXT_PX]], **look),
        tokenizer=_tokenizer("llava_next_video", processing.SPECIAL_TOKENS),
        video_processor=LlavaNextVideoVideoProcessor(**look),
        patch_size=_NEXT_PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATES["llava_next_video"],
    )
