"""Qwen2-VL: full attention in every block of the tower, M-RoPE in the language model."""

from __future__ import annotations

from vllm.model_executor.models import qwen2_vl as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.qwen_vl import PrunedQwen2Mixin, PrunedQwen2ProcessorMixin
from promprune_vllm.engine.worker.mrope import unsupported_reason

__all__ = ["PrunedQwen2VL", "unsupported_reason"]
seams.require(parts.QWEN2_VL)


class PrunedQwen2VLProcessor(PrunedQwen2ProcessorMixin, upstream.Qwen2VLMultiModalProcessor):
    """Placeholders of K tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2VLProcessor,
    info=upstream.Qwen2VLProcessingInfo,
    dummy_inputs=upstream.Qwen2VLDummyInputsBuilder,
)
class PrunedQwen2VL(PrunedQwen2Mixin, upstream.Qwen2VLForConditionalGeneration):
    """Qwen2-VL whose ``embed_multimodal`` returns K rows per image."""
