"""Model families: which architectures can be pruned, how, and in which configurations they cannot."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from promprune_vllm.config import Calibration
from promprune_vllm.engine.compat import verdict
from promprune_vllm.engine.keys import CALIBRATION
from promprune_vllm.errors import SettingsError

_CLS = "attention that CLS pays to the token in the layer that feeds the projector, mean over heads"
_RECEIVED = (
    "attention that a patch receives from all patches of its image in {}, mean over heads, then over the token's "
    "2 x 2 patches"
)
_RECEIVED_IN_TILE = (
    "attention that a patch receives from all patches of its tile in the layer that feeds the projector, mean "
    "over heads, shrunk as the tokens are"
)
_RECOUNTED = "consecutive over the kept tokens"
_ORIGINAL = "kept tokens and text have the same (t, h, w) as without pruning"
_CLS_OF_TOKEN = (
    "attention that CLS pays to a patch in the tower's last layer, mean over heads, then over the token's 2 x 2 "
    "patches, tile by tile"
)
_INTERN = "`ps_version` v1, tokens of other than 2 x 2 patches, LoRA on the tower"
_CLIP_ONLY = "towers other than CLIP, several feature layers, CLS fed to the language model, LoRA on the tower"
_SIGLIP_ONLY = (
    "towers other than SigLIP, several feature layers, the first patch dropped (`vision_feature_select_strategy` "
    "other than `full`), LoRA on the tower"
)
_MROPE = "pipeline parallelism, `--video-pruning-rate`, LoRA on the tower, a prompt that ends with a pruned image"
# `promprune calibrate` measures mu for other towers and image sizes.
_QWEN_MU: Calibration = MappingProxyType({"promprune": MappingProxyType({"mu": 0.5744})})
_BORROWED = "Qwen2.5-VL's; not measured for this tower"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: what the engine needs to know, and texts for the README.

    Args:
        model: Common name of the model.
        target: Our class as ``"module:name"``, imported only when needed since that loads the model's code.
        saliency: Where a token's saliency comes from.
        positions: Which positions the kept tokens have.
        refused: Configurations that cannot be pruned: requests with a budget are refused, others are served.
        calibration: Method -> options measured for this family, which replace the method's defaults.
        calibrated: Source of the calibration.
        measured: Whether it was measured for this family's vision tower, and not borrowed from another one.
        videos: How videos are pruned.
        megapixel_tokens: Visual tokens, before pruning, of an image of 1024 x 1024 pixels with the published
            checkpoints' processors; ``None`` if the model takes no images.
    """

    model: str
    target: str
    saliency: str
    positions: str
    refused: str
    calibration: Calibration = field(default_factory=lambda: MappingProxyType({}))
    calibrated: str = "the method's default"
    measured: bool = field(kw_only=True)
    videos: str = "it takes none"
    megapixel_tokens: int | None = field(kw_only=True)


_MODULES = "promprune_vllm.engine.families"
_ONE_RUN = "frame by frame, or as `evs`, `promprune-video` and `vidcom2` decide"
_FRAMES = f"{_ONE_RUN}; what is written between frames stays"
_patches = partial(
    Family,
    saliency=_RECEIVED.format("the last block"),
    positions=_ORIGINAL,
    refused=_MROPE,
    calibration=_QWEN_MU,
    calibrated=_BORROWED,
    measured=False,
    videos=_FRAMES,
)
"""A family whose tower takes patches, with M-RoPE."""
_tiles = partial(
    Family, saliency=_CLS_OF_TOKEN, positions=_RECOUNTED, refused=_INTERN, measured=False, videos=_FRAMES
)
"""A family whose tower takes tiles, with two by two patches for each token."""
_DEEPSTACK = f"{_ORIGINAL}; DeepStack rows stay with their tokens"
_LINEAR = f"{_ORIGINAL}; layers without attention have none"
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlavaForConditionalGeneration": Family(
            *("LLaVA-1.5", f"{_MODULES}.llava:PrunedLlava", _CLS, _RECOUNTED, _CLIP_ONLY),
            measured=True,
            megapixel_tokens=576,
        ),
        "LlavaNextForConditionalGeneration": Family(
            "LLaVA-NeXT",
            f"{_MODULES}.llava_next:PrunedLlavaNext",
            f"{_CLS}, tile by tile",
            _RECOUNTED,
            _CLIP_ONLY,
            measured=True,
            megapixel_tokens=2928,
        ),
        "LlavaOnevisionForConditionalGeneration": Family(
            "LLaVA-OneVision",
            f"{_MODULES}.llava_onevision:PrunedLlavaOnevision",
            f"{_RECEIVED_IN_TILE}, tile by tile",
            _RECOUNTED,
            _SIGLIP_ONLY,
            measured=False,
            videos=_ONE_RUN,
            megapixel_tokens=7371,
        ),
        "LlavaNextVideoForConditionalGeneration": Family(
            "LLaVA-NeXT-Video",
            f"{_MODULES}.llava_next_video:PrunedLlavaNextVideo",
            f"{_CLS}, then over the token's 2 x 2 patches",
            _RECOUNTED,
            _CLIP_ONLY,
            measured=False,
            videos=_ONE_RUN,
            megapixel_tokens=None,
        ),
        "Qwen2VLForConditionalGeneration": _patches(
            "Qwen2-VL", f"{_MODULES}.qwen2_vl:PrunedQwen2VL", megapixel_tokens=1369, videos=_ONE_RUN
        ),
        "Qwen2_5_VLForConditionalGeneration": _patches(
            "Qwen2.5-VL",
            f"{_MODULES}.qwen2_5_vl:PrunedQwen2_5_VL",
            saliency=_RECEIVED.format("the last block with full attention"),
            calibrated="the authors', at 1296 tokens",
            measured=True,
            videos=_ONE_RUN,
            megapixel_tokens=1369,
        ),
        "Qwen3VLForConditionalGeneration": _patches(
            "Qwen3-VL", f"{_MODULES}.qwen3_vl:PrunedQwen3VL", positions=_DEEPSTACK, megapixel_tokens=1024
        ),
        "Qwen3VLMoeForConditionalGeneration": _patches(
            "Qwen3-VL-MoE",
            f"{_MODULES}.qwen3_vl_moe:PrunedQwen3VLMoe",
            positions=_DEEPSTACK,
            megapixel_tokens=1024,
        ),
        "Qwen3_5ForConditionalGeneration": _patches(
            "Qwen3.5, Qwen3.6, Qwen3.8",
            f"{_MODULES}.qwen3_5:PrunedQwen3_5",
            positions=_LINEAR,
            megapixel_tokens=1024,
        ),
        "Qwen3_5MoeForConditionalGeneration": _patches(
            "Qwen3.5-MoE, Qwen3.6-MoE",
            f"{_MODULES}.qwen3_5_moe:PrunedQwen3_5Moe",
            positions=_LINEAR,
            megapixel_tokens=1024,
        ),
        "InternVLChatModel": _tiles(
            "InternVL2 to 3.5", f"{_MODULES}.internvl_chat:PrunedInternVLChat", megapixel_tokens=2560
        ),
        "InternVLForConditionalGeneration": _tiles(
            "InternVL3-HF, InternVL3.5-HF", f"{_MODULES}.internvl:PrunedInternVL", megapixel_tokens=2560
        ),
        "Glm4vForConditionalGeneration": _patches(
            "GLM-4.1V", f"{_MODULES}.glm4v:PrunedGlm4v", megapixel_tokens=1369
        ),
        "Glm4vMoeForConditionalGeneration": _patches(
            "GLM-4.5V, GLM-4.6V", f"{_MODULES}.glm4v_moe:PrunedGlm4vMoe", megapixel_tokens=1369
        ),
        "GlmOcrForConditionalGeneration": _patches(
            "GLM-OCR", f"{_MODULES}.glm_ocr:PrunedGlmOcr", megapixel_tokens=1369
        ),
    }
)
"""Architecture name in ``config.json`` -> family."""


def register() -> None:
    """Replace vLLM's model classes with ours for every architecture in ``FAMILIES`` that this vLLM allows."""
    from vllm import ModelRegistry

    found = verdict.current()

    registry_log = logging.getLogger("vllm.model_executor.models.registry")
    registry_log.addFilter(_is_unexpected)
    try:
        for architecture, family in FAMILIES.items():
            if found.family_reason(architecture) is None:
                ModelRegistry.register_model(architecture, family.target)
    finally:
        registry_log.removeFilter(_is_unexpected)


def calibration(model_config: Any) -> Calibration:
    """Return the options calibrated for a checkpoint, and otherwise those for its family.

    A checkpoint's own calibration is in its config.json: ``"promprune_calibration": {"promprune": {"mu": 0.5}}``.
    An option that it leaves out is the family's.

    Args:
        model_config: vLLM's ``ModelConfig``.

    Raises:
        SettingsError: The checkpoint's calibration is not such an object.
    """
    family = family_of(model_config.architectures)
    of_family: Calibration = {} if family is None else family.calibration
    of_checkpoint = getattr(model_config.hf_config, CALIBRATION, {})
    if not isinstance(of_checkpoint, dict) or not all(
        isinstance(options, dict) for options in of_checkpoint.values()
    ):
        raise SettingsError(
            f"config.json of {model_config.model} has {CALIBRATION} = {of_checkpoint!r}: it takes an object of "
            'methods with objects of options, such as {"promprune": {"mu": 0.5}}.'
        )
    names = dict.fromkeys((*of_family, *of_checkpoint))
    return {name: {**of_family.get(name, {}), **of_checkpoint.get(name, {})} for name in names}


def unsupported_reason(vllm_config: Any) -> str | None:
    """Return why visual tokens cannot be pruned with a ``VllmConfig``, or ``None`` if they can."""
    architectures = vllm_config.model_config.architectures
    family = family_of(architectures)
    if family is None:
        return (
            f"no model family for {', '.join(architectures) or 'this architecture'} "
            f"(supported: {', '.join(FAMILIES)})"
        )
    for architecture in architectures:
        if moved := verdict.current().family_reason(architecture):
            return moved
    if vllm_config.lora_config is not None and vllm_config.lora_config.enable_tower_connector_lora:
        return (
            "with --enable-tower-connector-lora, vLLM would assign adapters by kept tokens, but the tower "
            "processes every patch"
        )
    module = importlib.import_module(family.target.partition(":")[0])
    reason: str | None = module.unsupported_reason(vllm_config)
    return reason


def family_of(architectures: Iterable[str]) -> Family | None:
    """Return the family of a model, or ``None``."""
    return next((FAMILIES[name] for name in architectures if name in FAMILIES), None)


def _is_unexpected(record: logging.LogRecord) -> bool:
    # vLLM warns that the architecture is already registered; we replace it on purpose.
    return "already registered" not in record.getMessage()
