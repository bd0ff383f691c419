"""Qwen2.5-VL: most blocks of the tower attend within windows, and its tokens are in the order of the windows."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.qwen_vl import PrunedQwen2Mixin, PrunedQwen2ProcessorMixin
from promprune_vllm.engine.worker.device_copies import copy_to_device
from promprune_vllm.engine.worker.mrope import unsupported_reason

__all__ = ["PrunedQwen2_5_VL", "unsupported_reason"]
seams.require(parts.QWEN2_5_VL)


class PrunedQwen2_5_VLProcessor(PrunedQwen2ProcessorMixin, upstream.Qwen2_5_VLMultiModalProcessor):
    """Placeholders of K tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2_5_VLProcessor,
    info=upstream.Qwen2_5_VLProcessingInfo,
    dummy_inputs=upstream.Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen2_5_VL(PrunedQwen2Mixin, upstream.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose ``embed_multimodal`` returns K rows per image."""

    def saliency_block(self) -> int:
        """Return the last block with full attention: in other blocks, patches attend only within their window."""
        return int(max(self.visual.fullatt_block_indexes))

    def in_raster_order(self, values: Tensor, grid: list[int]) -> Tensor:
        """Reorder ``(N, ...)`` values of an image from window order to raster order."""
        order, _ = self.visual.get_window_index_thw(*grid)
        return values[copy_to_device(order.argsort(), values.device)]
