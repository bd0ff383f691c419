"""LLaVA-1.5: a CLIP tower, a projector, and 1-D positions, consecutive over the kept tokens.

The saliency is the attention that CLS pays in the layer whose output feeds the projector; vLLM does not create the
layers after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models import llava as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor

from promprune_vllm.core import geometry
from promprune_vllm.core.features import Need
from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin
from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families import clip_tower
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.pruned_model import PrunedModelMixin

seams.require(parts.CLIP, parts.LLAVA)


def unsupported_reason(vllm_config: VllmConfig) -> str | None:
    """Return why this LLaVA-1.5 cannot be pruned, or ``None``."""
    return clip_tower.unsupported_tower(vllm_config.model_config.hf_config)


class PrunedLlavaProcessor(PrunedProcessorMixin, upstream.LlavaMultiModalProcessor):
    """Placeholders of K tokens."""

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:  # noqa: ARG002
        """Return how many visual tokens an image has in vLLM."""
        return int(self.info.get_max_image_tokens())  # every image is resized to the same size

    def boxes(self, width: int, height: int) -> list[geometry.Box | None]:
        """Return the pixel box of each visual token of an image."""
        config = self.info.get_hf_config().vision_config
        side = config.image_size // config.patch_size
        area = clip_tower.visible_area(self.info.get_hf_processor().image_processor, width, height)
        return [geometry.clipped(cell, width, height) for cell in geometry.grid(side, side, area)]


def build_processor(info: Any, dummy_inputs: Any, **options: Any) -> BaseMultiModalProcessor:
    """Return our processor, or vLLM's own for a LLaVA that cannot be pruned."""
    if clip_tower.unsupported_tower(info.get_hf_config()):
        return upstream._build_llava_or_pixtral_hf_processor(info, dummy_inputs, **options)
    return PrunedLlavaProcessor(info, dummy_inputs, **options)


@MULTIMODAL_REGISTRY.register_processor(
    build_processor,
    info=upstream._build_llava_or_pixtral_hf_info,
    dummy_inputs=upstream.LlavaDummyInputsBuilder,
)
class PrunedLlava(PrunedModelMixin, clip_tower.ClipTowerMixin, upstream.LlavaForConditionalGeneration):
    """LLaVA-1.5 whose ``embed_multimodal`` returns K rows per image."""

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[EncodedImage]:
        """Encode some of the images and return them with the requested features.

        Args:
            inputs: ``pixel_values`` of ``(B, 3, H, W)``.
            items: Which of the B images.
            needs: Features to capture.
        """
        tiles = self.tile_features(inputs["pixel_values"][items], needs)
        return [EncodedImage.whole(features.projected, features) for features in tiles]

    def embed_tiles(self, pixels: Tensor) -> Any:
        """Encode and project ``(B, 3, H, W)`` images to ``(B, N, D)``."""
        return self.embed_unpruned(pixel_values=pixels)
