"""Tiny GLM-V checkpoints: GLM-4.1V, which is dense, GLM-4.5V, which has experts, and GLM-OCR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from promprune_vllm.demo import glm_processing as inputs
from promprune_vllm.demo import model, processing
from promprune_vllm.demo.random_weights import DType

CLASSES: Mapping[str, str] = MappingProxyType({"glm4v": "Glm4v", "glm4v_moe": "Glm4vMoe", "glm_ocr": "GlmOcr"})
"""Prefix of the transformers class names, by ``model_type``."""

_TOWER: Mapping[str, Any] = MappingProxyType(
    {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 128,
        "num_heads": 2,
        "image_size": 336,  # of the position embeddings, which are interpolated to the image's size
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
)
_MORE_VISION: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    # Of the blocks: in the others it is the merger's width, and blocks are as wide as the output.
    {"glm4v": {}, "glm4v_moe": {}, "glm_ocr": {"intermediate_size": 192}}
)
_MORE_TEXT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "glm4v": {},
        "glm4v_moe": {
            "head_dim": 32,
            "use_qk_norm": False,
            "first_k_dense_replace": 1,  # the other three layers have experts
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        "glm_ocr": {
            "head_dim": 32,
            "attention_bias": False,
            # Of the tower's merger too: vLLM reads its width here, transformers takes three times the output's.
            "intermediate_size": 3 * _TOWER["out_hidden_size"],
        },
    }
)


def build_glm(family: str, directory: Path, seed: int, dtype: DType) -> Path:
    """Write a checkpoint of a model type, a key of ``CLASSES``."""

    def write(target: Path) -> None:
        import transformers

        model_class = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")
        model.write_weights(target, model_class, _config(family, dtype), seed, dtype)
        inputs.glm_processor(
            family,
            _TOWER["patch_size"],
            _TOWER["spatial_merge_size"],
            max_tokens=model.TINY_TEXT["max_position_embeddings"],
        ).save_pretrained(target)

    contents = {"seed": seed, "dtype": dtype, "vision": _vision(family), "text": _text(family)}
    return model.publish(directory, model.stamp(family, contents), write)


def _vision(family: str) -> dict[str, Any]:
    return {**_TOWER, **_MORE_VISION[family]}


def _text(family: str) -> dict[str, Any]:
    # Half of a head of 32 is rotated, all of it in GLM-OCR; its frequencies are split over time, height and width.
    share, sections = (1.0, [4, 6, 6]) if family == "glm_ocr" else (0.5, [2, 3, 3])
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": share,
        "mrope_section": sections,
    }
    sizes = {**model.TINY_TEXT, **processing.ROLE_IDS, "attention_bias": True, "rope_parameters": rope}
    return {**sizes, **_MORE_TEXT[family]}


def _config(family: str, dtype: DType) -> Any:
    import transformers

    name = CLASSES[family]
    return getattr(transformers, f"{name}Config")(
        architectures=[f"{name}ForConditionalGeneration"],
        vision_config=_vision(family),
        text_config=getattr(transformers, f"{name}TextConfig")(**_text(family), dtype=dtype).to_dict(),
        image_token_id=processing.IMAGE_ID,
        video_token_id=inputs.VIDEO_ID,
        image_start_token_id=inputs.IMAGE_START_ID,
        image_end_token_id=inputs.IMAGE_END_ID,
        video_start_token_id=inputs.VIDEO_START_ID,
        video_end_token_id=inputs.VIDEO_END_ID,
        dtype=dtype,
    )
