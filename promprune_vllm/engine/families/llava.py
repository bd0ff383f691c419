"""LLaVA-1.5: a CLIP tower, a projector, and 1-D positions that are counted anew over the kept tokens.

The saliency is the attention CLS pays in the layer whose output feeds the projector; vLLM does not even build
the layers above it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig
from vllm.model_executor.models import llava as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.engine import checks
from promprune_vllm.engine.capture import clip_attention, inputs_of
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

    supplies = Need.PROJECTED | Need.ENCODER | Need.KEYS | Need.SALIENCY

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

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[VisionFeatures]:
        """Encode some of the images and return what a method may look at, one group per image.

        Args:
            inputs: ``pixel_values`` of ``(B, 3, H, W)``.
            items: Which of the B images.
            needs: What the method asks for.
        """
        layer = self.vision_tower.vision_model.encoder.layers[-1]
        with clip_attention(layer.self_attn, needs) as attention, inputs_of(self.multi_modal_projector) as encoder:
            projected = self.embed_unpruned(pixel_values=inputs["pixel_values"][items])  # (b, N, D)
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        saliency, keys = attention.get(Need.SALIENCY), attention.get(Need.KEYS)
        return [
            VisionFeatures(
                projected=rows,
                grid=(1, side, side),
                saliency=None if saliency is None else saliency[i],
                keys=None if keys is None else keys[i],
                encoder=encoder[0][i] if Need.ENCODER in needs else None,
            )
            for i, rows in enumerate(projected)
        ]

    def project(self, rows: Tensor) -> Tensor:
        """Project ``(K, Dv)`` rows that a method merged before the projector, to ``(K, D)``."""
        projected: Tensor = self.multi_modal_projector(rows)
        return projected
