"""InternVL 2 to 3.5 in the layout of OpenGVLab's own checkpoints, whose configuration is remote code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models import internvl as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processors.internvl import calculate_internvl_targets

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.internvl_tower import InternVLMixin, InternVLProcessorMixin, unsupported_reason

__all__ = ["PrunedInternVLChat", "unsupported_reason"]
seams.require(parts.INTERNVL_CHAT)


class PrunedInternVLChatProcessor(InternVLProcessorMixin, upstream.InternVLMultiModalProcessor):
    """Placeholders of K tokens."""

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:
        """Return how many visual tokens an image has in vLLM."""
        info: Any = self.info
        size, processor = images.get_image_size(index), info.get_hf_processor(**kwargs)
        tokens = info.get_num_image_tokens(image_width=size.width, image_height=size.height, processor=processor)
        return int(tokens)

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of tiles that an image is cut into."""
        processor = self.info.get_hf_processor()
        side = processor.image_processor.image_size
        _, across, down = calculate_internvl_targets(
            orig_width=width,
            orig_height=height,
            target_ratios=processor.resolve_target_ratios(use_thumbnail=False),
            image_size=side,
            use_thumbnail=False,
        )
        return down // side, across // side


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLChatProcessor,
    info=upstream.InternVLProcessingInfo,
    dummy_inputs=upstream.InternVLDummyInputsBuilder,
)
class PrunedInternVLChat(InternVLMixin, upstream.InternVLChatModel):
    """InternVL whose ``embed_multimodal`` returns K rows per image."""

    pixels = "pixel_values_flat"
    video_pixels = "pixel_values_flat_video"

    def saliency_block(self) -> Any:
        """Return the tower's last layer."""
        return self.vision_model.encoder.layers[-1]

    def saliency_layer(self) -> Any:
        """Return its attention."""
        return self.saliency_block().attn

    def projector(self) -> Any:
        """Return the module that gets ``(T, n, 4 * Dv)`` rows, a token's four patches side by side."""
        return self.mlp1
