"""GLM-4.5V and 4.6V, with experts: tower and prompts are those of GLM-4.1V."""

from __future__ import annotations

from vllm.model_executor.models import glm4_1v as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.glm4v import PrunedGlm4vMixin, PrunedGlm4vProcessor
from promprune_vllm.engine.worker.mrope import unsupported_reason

__all__ = ["PrunedGlm4vMoe", "unsupported_reason"]
seams.require(parts.GLM4V)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGlm4vProcessor, info=upstream.Glm4vProcessingInfo, dummy_inputs=upstream.Glm4vDummyInputsBuilder
)
class PrunedGlm4vMoe(PrunedGlm4vMixin, upstream.Glm4vMoeForConditionalGeneration):
    """GLM-4.5V whose ``embed_multimodal`` returns K rows per image."""
