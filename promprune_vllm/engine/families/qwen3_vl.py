"""Qwen3-VL: each token also has DeepStack rows from earlier blocks, which are pruned with it.

Methods use only the merger's output. If a method merges tokens, the DeepStack rows stay those of the kept tokens.
"""

from __future__ import annotations

from vllm.model_executor.models import qwen3_vl as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.qwen_vl import PrunedQwen3Mixin, PrunedQwenProcessorMixin
from promprune_vllm.engine.worker.mrope import unsupported_reason

__all__ = ["PrunedQwen3VL", "unsupported_reason"]
seams.require(parts.QWEN3_VL)


class PrunedQwen3VLProcessor(PrunedQwenProcessorMixin, upstream.Qwen3VLMultiModalProcessor):
    """Placeholders of K tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor,
    info=upstream.Qwen3VLProcessingInfo,
    dummy_inputs=upstream.Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3VL(PrunedQwen3Mixin, upstream.Qwen3VLForConditionalGeneration):
    """Qwen3-VL whose ``embed_multimodal`` returns K rows per image."""
