"""Shared code of the families with a CLIP tower: LLaVA-1.5, LLaVA-NeXT and LLaVA-NeXT-Video."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig

from promprune_vllm.core.geometry import Box, centre_crop
from promprune_vllm.engine.families.tile_tower import TileTowerMixin


def unsupported_tower(hf_config: Any) -> str | None:
    """Return why a LLaVA model cannot be pruned, or ``None``."""
    if not isinstance(hf_config.vision_config, CLIPVisionConfig):
        return f"its vision tower is {hf_config.vision_config.model_type}, which has no CLS token (only CLIP has)"
    if not isinstance(hf_config.vision_feature_layer, int):
        return f"it mixes the vision layers {hf_config.vision_feature_layer}; only a single layer is supported"
    if hf_config.vision_feature_select_strategy != "default":
        strategy = hf_config.vision_feature_select_strategy
        return f"it feeds the CLS token to the language model (vision_feature_select_strategy={strategy!r})"
    return None


def visible_area(image_processor: Any, width: int, height: int) -> Box:
    """Return the area of an image that the tower gets: all of it, or a square from its center."""
    size, crop = image_processor.size, image_processor.crop_size
    if not image_processor.do_center_crop:
        return (0.0, 0.0, float(width), float(height))
    if size.get("shortest_edge"):
        return centre_crop(width, height, shortest=size["shortest_edge"], crop=crop["height"])
    # Resized to a rectangle first, which in every published model has the tower's size, so nothing is cropped.
    return (0.0, 0.0, float(width), float(height))


class ClipTowerMixin(TileTowerMixin):
    """Captures features of a CLIP tower, or of SigLIP's with the same names; comes before vLLM's model class."""

    def saliency_layer(self) -> Any:
        """Return the attention of the layer that feeds the projector: vLLM does not create the layers after it."""
        model: Any = self
        return model.vision_tower.vision_model.encoder.layers[-1].self_attn

    def projector(self) -> Any:
        """Return the module that projects the tower's rows."""
        model: Any = self
        return model.multi_modal_projector
