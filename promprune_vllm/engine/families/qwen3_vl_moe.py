"""Qwen3-VL with experts: tower and prompts are those of Qwen3-VL."""

from __future__ import annotations

from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.qwen_vl import PrunedQwen3Mixin, PrunedQwenProcessorMixin
from promprune_vllm.engine.worker.mrope import unsupported_reason

__all__ = ["PrunedQwen3VLMoe", "unsupported_reason"]
seams.require(parts.QWEN3_VL)
seams.require(parts.QWEN3_VL_MOE)


class PrunedQwen3VLMoeProcessor(PrunedQwenProcessorMixin, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Placeholders of K tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLMoeProcessor,
    info=qwen3_vl_moe.Qwen3VLMoeProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3VLMoe(PrunedQwen3Mixin, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL with experts whose ``embed_multimodal`` returns K rows per image."""
