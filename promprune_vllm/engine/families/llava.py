"""LLaVA-1.5: a CLIP tower, a projector, and 1-D positions that are counted anew over the kept tokens.

The saliency is the attention CLS pays in the layer whose output feeds the projector; vLLM does not even build
the layers above it.
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, LlavaConfig
from vllm.model_executor.models import llava as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.engine import checks
from promprune_vllm.engine.capture import cls_attention
from promprune_vllm.engine.model import PrunedModelMixin
from promprune_vllm.engine.processor import PrunedProcessorMixin

checks.require_names(checks.LLAVA_NAMES)


def why_not(hf_config: LlavaConfig) -> str | None:
    """Return why this LLaVA cannot be pruned, or ``None``."""
    if not isinstance(hf_config.vision_config, CLIPVisionConfig):
        return f"its vision tower is {hf_config.vision_config.model_type}, which has no CLS token (only CLIP has)"
    if not isinstance(hf_config.vision_feature_layer, int):
        return f"it mixes the vision layers {hf_config.vision_feature_layer}; only a single layer is supported"
    if hf_config.vision_feature_select_strategy != "default":
        strategy = hf_config.vision_feature_select_strategy
        return f"it feeds the CLS token to the language model (vision_feature_select_strategy={strategy!r})"
    return None


class PrunedLlavaProcessor(PrunedProcessorMixin, upstream.LlavaMultiModalProcessor):  # type: ignore[misc]
    """Placeholders of K tokens."""

    def _image_tokens(self, images: Any, index: int) -> int:  # noqa: ARG002  every image is resized to one size
        return int(self.info.get_max_image_tokens())


def build_processor(info: Any, dummy_inputs: Any) -> BaseMultiModalProcessor:
    """Return our processor, or vLLM's own for a LLaVA that cannot be pruned."""
    if why_not(info.get_hf_config()):
        return upstream._build_llava_or_pixtral_hf_processor(info, dummy_inputs)
    return PrunedLlavaProcessor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    build_processor,
    info=upstream._build_llava_or_pixtral_hf_info,
    dummy_inputs=upstream.LlavaDummyInputsBuilder,
)
class PrunedLlava(PrunedModelMixin, upstream.LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-1.5 whose ``embed_multimodal`` returns K rows per image."""

    supplies = Need.PROJECTED | Need.SALIENCY

    def capture(self, inputs: dict[str, Any], items: slice) -> list[VisionFeatures]:
        """Encode some of the images and return what a method may look at, one group per image.

        Args:
            inputs: ``pixel_values`` of ``(B, 3, H, W)``.
            items: Which of the B images.
        """
        layer = self.vision_tower.vision_model.encoder.layers[-1]
        with cls_attention(layer.self_attn) as saliency:
            projected = self.embed_unpruned(pixel_values=inputs["pixel_values"][items])  # (b, N, D)
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return [
            VisionFeatures(projected=rows, grid=(1, side, side), saliency=row)
            for rows, row in zip(projected, saliency[0], strict=True)
        ]
