"""Qwen3.5, with Qwen3.6 and 3.8: three of four layers have a state of fixed size instead of a KV cache."""

from __future__ import annotations

from vllm.model_executor.models import qwen3_5, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.qwen_vl import PrunedQwen3Mixin, PrunedQwenProcessorMixin
from promprune_vllm.engine.worker.mrope import unsupported_reason

__all__ = ["PrunedQwen3_5", "unsupported_reason"]
seams.require(parts.QWEN3_VL)
seams.require(parts.QWEN3_5)


class PrunedQwen3_5Processor(PrunedQwenProcessorMixin, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Placeholders of K tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3_5Processor,
    info=qwen3_5.Qwen3_5ProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3_5(PrunedQwen3Mixin, qwen3_5.Qwen3_5ForConditionalGeneration):
    """Qwen3.5 whose ``embed_multimodal`` returns K rows per image."""
