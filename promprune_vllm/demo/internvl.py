"""Tiny InternVL checkpoints with the same weights in both published layouts: the original and transformers'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from promprune_vllm.demo import internvl_processing as inputs
from promprune_vllm.demo import model, processing
from promprune_vllm.demo.random_weights import DType, random_weights

if TYPE_CHECKING:
    import torch

_TILE_PX, _PATCH_PX, _MAX_TILES = 112, 14, 6
_SHUFFLE = 0.5  # 2 x 2 patches are one visual token
_TILE_TOKENS = int((_TILE_PX // _PATCH_PX * _SHUFFLE) ** 2)
# These have the same names in both layouts.
_TOWER: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": _TILE_PX,
        "patch_size": _PATCH_PX,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
    }
)
_CHAT: Mapping[str, Any] = MappingProxyType(
    {
        "architectures": ["InternVLChatModel"],
        "select_layer": -1,
        "downsample_ratio": _SHUFFLE,
        "ps_version": "v2",
        "force_image_size": _TILE_PX,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": _MAX_TILES,
        "pad2square": False,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
    }
)
# Names in transformers' layout -> names in the original one.
_ORIGINAL_NAMES = (
    (r"^vision_tower\.", "vision_model."),
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"embeddings\.cls_token$", "embeddings.class_embedding"),
    (r"embeddings\.position_embeddings$", "embeddings.position_embedding"),
    (r"\.patch_embeddings\.projection\.", ".patch_embedding."),
    (r"\.encoder\.layer\.", ".encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
)


def build_internvl(directory: Path, seed: int, dtype: DType) -> Path:
    """Write a checkpoint in transformers' layout, as the published ones named ``-HF``."""

    def write(target: Path) -> None:
        model.save_checkpoint(target, _weights(seed, dtype), _config(dtype))
        inputs.internvl_processor(
            _TILE_PX, _TILE_TOKENS, _MAX_TILES, max_tokens=model.TINY_TEXT["max_position_embeddings"]
        ).save_pretrained(target)

    return model.publish(directory, model.stamp("internvl", _spec(seed, dtype)), write)


def build_internvl_chat(directory: Path, seed: int, dtype: DType) -> Path:
    """Write a checkpoint in the original layout, whose configuration is code beside it."""

    def write(target: Path) -> None:
        model.save_checkpoint(target, _original_layout(_weights(seed, dtype)), _chat_config(dtype))
        inputs.tile_preprocessing(_TILE_PX).save_pretrained(target)
        inputs.internvl_tokenizer(
            "internvl_chat", max_tokens=model.TINY_TEXT["max_position_embeddings"]
        ).save_pretrained(target)

    contents = {**_spec(seed, dtype), "chat": dict(_CHAT)}
    return model.publish(directory, model.stamp("internvl_chat", contents), write)


def _spec(seed: int, dtype: DType) -> dict[str, Any]:
    return {"seed": seed, "dtype": dtype, "vision": dict(_TOWER), "text": _text(), "tiles": _MAX_TILES}


def _text() -> dict[str, Any]:
    return {
        **model.TINY_TEXT,
        **processing.ROLE_IDS,
        "num_hidden_layers": 3,  # with more, every answer is one letter repeated
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }


def _weights(seed: int, dtype: DType) -> dict[str, torch.Tensor]:
    from transformers import InternVLForConditionalGeneration

    return random_weights(InternVLForConditionalGeneration, _config(dtype), seed, dtype)


def _config(dtype: DType) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    return InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        vision_config=InternVLVisionConfig(**_TOWER, attention_bias=True, dtype=dtype),
        text_config=Qwen2Config(**_text(), dtype=dtype),
        image_token_id=processing.IMAGE_ID,
        image_seq_length=_TILE_TOKENS,
        downsample_ratio=_SHUFFLE,
        tie_word_embeddings=False,
        dtype=dtype,
    )


def _chat_config(dtype: DType) -> Any:
    from transformers import Qwen2Config

    from promprune_vllm.demo.configuration_internvl_chat import InternVLChatConfig

    tower = {**_TOWER, "qkv_bias": True, "qk_normalization": False, "initializer_factor": 1.0}
    language = Qwen2Config(**_text(), architectures=["Qwen2ForCausalLM"], dtype=dtype).to_dict()
    return InternVLChatConfig(vision_config=tower, llm_config=language, **_CHAT, dtype=dtype)


def _original_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights of transformers' layout in the original one: the tower's q, k and v are one matrix."""
    import torch

    original = {}
    for name, weight in weights.items():
        part = re.search(r"(?<=\.attention\.)[qkv]_proj", name)  # the language model's are .self_attn.
        if part is None:
            original[_original_name(name)] = weight
        elif part[0] == "q_proj":
            parts = [weights[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            original[_original_name(name.replace("q_proj", "qkv"))] = torch.cat(parts)
    return original


def _original_name(name: str) -> str:
    for ours, theirs in _ORIGINAL_NAMES:
        name = re.sub(ours, theirs, name)
    return name
