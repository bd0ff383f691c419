"""GLM-OCR: the tower of GLM-4.1V with normalized queries and keys, and the same prompts."""

from __future__ import annotations

from vllm.model_executor.models import glm4_1v, glm_ocr
from vllm.multimodal import MULTIMODAL_REGISTRY

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.glm4v import PrunedGlm4vMixin, PrunedGlm4vProcessor
from promprune_vllm.engine.worker.mrope import unsupported_reason

__all__ = ["PrunedGlmOcr", "unsupported_reason"]
seams.require(parts.GLM4V)
seams.require(parts.GLM_OCR)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGlm4vProcessor, info=glm4_1v.Glm4vProcessingInfo, dummy_inputs=glm4_1v.Glm4vDummyInputsBuilder
)
class PrunedGlmOcr(PrunedGlm4vMixin, glm_ocr.GlmOcrForConditionalGeneration):
    """GLM-OCR whose ``embed_multimodal`` returns K rows per image."""
