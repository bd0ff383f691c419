"""Shared code of the families with a CLIP tower: LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.geometry import Box, centre_crop
from promprune_vllm.engine.worker.tower_hooks import clip_attention, inputs_of

SUPPLIES = Need.PROJECTED | Need.ENCODER | Need.KEYS | Need.SALIENCY


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


class ClipTowerMixin:
    """Captures features of tiles of ``image_size`` pixels; comes before vLLM's model class."""

    def tile_features(self, pixels: Tensor, needs: Need) -> list[VisionFeatures]:
        """Encode tiles and return the features of each.

        Args:
            pixels: ``(T, 3, H, W)``.
            needs: Features to capture.
        """
        model: Any = self
        attention_layer = model.vision_tower.vision_model.encoder.layers[-1].self_attn
        with clip_attention(attention_layer, needs) as captured, inputs_of(model.multi_modal_projector) as encoder:
            projected = self.embed_tiles(pixels)  # (T, n, D)
        config = model.config.vision_config
        side = config.image_size // config.patch_size
        saliency, keys = captured.get(Need.SALIENCY), captured.get(Need.KEYS)
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

    def embed_tiles(self, pixels: Tensor) -> Sequence[Tensor] | Tensor:
        """Encode and project ``(T, 3, H, W)`` tiles to ``(T, n, D)``, without pruning."""
        raise NotImplementedError

    def project(self, rows: Tensor) -> Tensor:
        """Project ``(K, Dv)`` rows that a method merged before the projector, to ``(K, D)``."""
        model: Any = self
        projected: Tensor = model.multi_modal_projector(rows)
        return projected
