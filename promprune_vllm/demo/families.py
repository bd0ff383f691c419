"""Tiny checkpoints with seeded random weights, one per model family, for tests and first steps.

Each has its family's real structure (tiles, windows, deepstack, M-RoPE, experts), real processors and the weight
names of published checkpoints. Only the sizes are small, and the tokenizer works on bytes. The answers are
meaningless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from promprune_vllm.demo import glm, internvl, llava_video, model, processing
from promprune_vllm.demo import qwen_processing as qwen
from promprune_vllm.demo.random_weights import DType

Builder = Callable[[Path, int, DType], Path]

TINY_LLAVA = model.DemoModelSpec(
    image_px=168,  # 144 visual tokens
    vision_hidden=64,
    vision_heads=2,
    vision_mlp=128,
    vision_layers=4,
    hidden=128,
    heads=4,
    mlp=256,
    layers=3,
)
_LLAVA_NEXT = replace(TINY_LLAVA, image_px=112)  # 64 patches per tile
# LLaVA-1.6's grids in tiles (height, width): the crops of an image fill one of them.
_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

_HEAD = 32  # head size of the language model; its 16 rotary frequencies are split over time, height and width
_SECTIONS = MappingProxyType(
    {
        "qwen2_vl": [4, 6, 6],
        "qwen2_5_vl": [4, 6, 6],
        "qwen3_vl": [6, 5, 5],
        "qwen3_vl_moe": [6, 5, 5],
        "qwen3_5": [2, 1, 1],  # a quarter of a head is rotated
        "qwen3_5_moe": [2, 1, 1],
    }
)
_TOWER: Mapping[str, Any] = MappingProxyType({"num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2})
_QWEN3_TOWER: Mapping[str, Any] = MappingProxyType(
    {
        **_TOWER,
        "depth": 5,
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 128,
        "patch_size": 16,
        "num_position_embeddings": 24 * 24,
        "deepstack_visual_indexes": [0, 1, 3],  # added to the outputs of the first three text layers
    }
)
_QWEN_VISION: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen2_vl": {**_TOWER, "depth": 4, "embed_dim": 64, "mlp_ratio": 2, "hidden_size": 128, "patch_size": 14},
        "qwen2_5_vl": {
            **_TOWER,
            "depth": 5,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 128,
            "patch_size": 14,
            "window_size": 112,  # pixels: 4 x 4 visual tokens
            "fullatt_block_indexes": [1, 4],  # the other three use windowed attention
        },
        "qwen3_vl": _QWEN3_TOWER,
        "qwen3_vl_moe": _QWEN3_TOWER,
        "qwen3_5": {**_QWEN3_TOWER, "deepstack_visual_indexes": []},
        "qwen3_5_moe": {**_QWEN3_TOWER, "deepstack_visual_indexes": []},
    }
)
_EXPERTS: Mapping[str, Any] = MappingProxyType(
    {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
)
# Three layers with a state of fixed size, then one with attention, as in the published models. vLLM's kernels for
# CPUs need heads of 64 or 128 in the former; the keys' sizes are such that a block has few tokens.
_LINEAR: Mapping[str, Any] = MappingProxyType(
    {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "num_key_value_heads": 4,
        "mamba_ssm_dtype": "float32",
    }
)
_MORE_TEXT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen3_vl": {},
        "qwen3_vl_moe": {**_EXPERTS, "norm_topk_prob": True},
        "qwen3_5": _LINEAR,
        "qwen3_5_moe": {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 64},
    }
)


_BFLOAT16_ON_CPU = ("qwen3_5", "qwen3_5_moe")  # vLLM's kernels for their layers with a state take nothing else


def build_family_model(family: str, directory: Path, *, seed: int = 0, dtype: DType = "float32") -> Path:
    """Write a tiny checkpoint of a family for vLLM and transformers; do nothing if `directory` already has it.

    Args:
        family: A key of `FAMILIES`.
        directory: New, empty, or an earlier demo model, which is replaced.
        seed: Random seed; the same seed gives the same bytes.
        dtype: Type of the weights.

    Raises:
        ValueError: There is no such family.
        FileExistsError: The directory has other contents.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no model family {family!r}; choose from {', '.join(FAMILIES)}")
    return FAMILIES[family](directory, seed, dtype)


def serving_dtype(family: str) -> DType:
    """Return the type in which a CPU serves a family's checkpoint exactly, or at all."""
    return "bfloat16" if family in _BFLOAT16_ON_CPU else "float32"


def has_remote_code(family: str) -> bool:
    """Return whether a family's configuration is code beside its weights, which a server must be told to trust."""
    return family == "internvl_chat"


def _build_llava(directory: Path, seed: int, dtype: DType) -> Path:
    return model.build_demo_model(directory, replace(TINY_LLAVA, seed=seed, dtype=dtype))


def _build_llava_next(directory: Path, seed: int, dtype: DType) -> Path:
    spec = replace(_LLAVA_NEXT, seed=seed, dtype=dtype)
    grids = [[rows * spec.image_px, columns * spec.image_px] for rows, columns in _GRIDS]

    def write(target: Path) -> None:
        from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

        base = model.llava_config(spec)
        config = LlavaNextConfig(
            architectures=["LlavaNextForConditionalGeneration"],
            vision_config=base.vision_config,
            text_config=base.text_config,
            image_token_index=processing.IMAGE_ID,
            image_seq_length=spec.visual_tokens,
            image_grid_pinpoints=grids,
            **processing.ROLE_IDS,
            dtype=dtype,
        )
        model.write_weights(target, LlavaNextForConditionalGeneration, config, seed, dtype)
        processing.llava_next_processor(
            spec.image_px, spec.patch_px, grids, max_tokens=spec.max_tokens
        ).save_pretrained(target)

    contents = {"seed": seed, "dtype": dtype, "grids": grids, "sizes": asdict(spec)}
    return model.publish(directory, model.stamp("llava_next", contents), write)


def _build_qwen(family: str, directory: Path, seed: int, dtype: DType) -> Path:
    vision = _QWEN_VISION[family]

    def write(target: Path) -> None:
        import transformers

        model_class = getattr(transformers, f"{qwen.CLASSES[family]}ForConditionalGeneration")
        model.write_weights(target, model_class, _qwen_config(family, dtype), seed, dtype)
        qwen.qwen_processor(
            family,
            vision["patch_size"],
            vision["spatial_merge_size"],
            max_tokens=model.TINY_TEXT["max_position_embeddings"],
        ).save_pretrained(target)

    contents = {"seed": seed, "dtype": dtype, "vision": dict(vision), "text": _qwen_text(family)}
    return model.publish(directory, model.stamp(family, contents), write)


def _qwen_text(family: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": _SECTIONS[family]}
    if not family.startswith("qwen3"):
        return {**model.TINY_TEXT, "rope_parameters": rope}
    # Since Qwen3-VL, the head size is set separately, and the frequencies are interleaved.
    rope["mrope_interleaved"] = True
    if family.startswith("qwen3_5"):
        rope["partial_rotary_factor"] = 0.25
    return {**model.TINY_TEXT, **_MORE_TEXT[family], "head_dim": _HEAD, "rope_parameters": rope}


def _qwen_config(family: str, dtype: DType) -> Any:
    import transformers

    name = qwen.CLASSES[family]
    text_class = getattr(transformers, f"{name}TextConfig")
    return getattr(transformers, f"{name}Config")(
        architectures=[f"{name}ForConditionalGeneration"],
        vision_config=dict(_QWEN_VISION[family]),
        text_config=text_class(**_qwen_text(family), **processing.ROLE_IDS, dtype=dtype).to_dict(),
        image_token_id=processing.IMAGE_ID,
        video_token_id=qwen.VIDEO_ID,
        vision_start_token_id=qwen.VISION_START_ID,
        vision_end_token_id=qwen.VISION_END_ID,
        dtype=dtype,
    )


FAMILIES: Mapping[str, Builder] = MappingProxyType(
    {
        "llava": _build_llava,
        "llava_next": _build_llava_next,
        "llava_onevision": llava_video.build_onevision,
        "llava_next_video": llava_video.build_next_video,
        **{family: partial(_build_qwen, family) for family in _QWEN_VISION},
        "internvl": internvl.build_internvl,
        "internvl_chat": internvl.build_internvl_chat,
        **{family: partial(glm.build_glm, family) for family in glm.CLASSES},
    }
)
