"""LLaVA-NeXT: one tile with the whole image, then crops at full resolution, merged and without padding.

vLLM ends every row of the merged crops with a learned newline; newlines are kept only if the budget exceeds all
visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import VllmConfig
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor

from promprune_vllm.core import geometry
from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin
from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families import clip_tower
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.pruned_model import PrunedModelMixin

seams.require(parts.CLIP, parts.LLAVA_NEXT)


def unsupported_reason(vllm_config: VllmConfig) -> str | None:
    """Return why this LLaVA-NeXT cannot be pruned, or ``None``."""
    return clip_tower.unsupported_tower(vllm_config.model_config.hf_config)


class PrunedLlavaNextProcessor(PrunedProcessorMixin, llava_next.LlavaNextMultiModalProcessor):
    """Placeholders of K tokens."""

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:  # noqa: ARG002
        """Return how many visual tokens an image has in vLLM."""
        size = images.get_image_size(index)
        return int(self.info.get_num_image_tokens(image_width=size.width, image_height=size.height))

    def boxes(self, width: int, height: int) -> list[geometry.Box | None]:
        """Return the pixel box of each token: of the whole image, then of the crops; ``None`` for newlines."""
        config = self.info.get_hf_config()
        pixels = config.vision_config.image_size
        rows, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, pixels)
        side = pixels // config.vision_config.patch_size
        canvas = geometry.padded(width, height, (columns * pixels, rows * pixels))
        tiles = [(0.0, 0.0, float(width), float(height)), *geometry.grid(rows, columns, canvas)]
        cells = [cell for tile in tiles for cell in geometry.grid(side, side, tile)]
        size = torch.tensor([height, width])
        source = sources(config, len(tiles), side * side, size).tolist()
        return [None if i < 0 else geometry.clipped(cells[i], width, height) for i in source]


def build_processor(info: Any, dummy_inputs: Any, **options: Any) -> BaseMultiModalProcessor:
    """Return our processor, or vLLM's own for a LLaVA-NeXT that cannot be pruned."""
    ours = clip_tower.unsupported_tower(info.get_hf_config()) is None
    processor = PrunedLlavaNextProcessor if ours else llava_next.LlavaNextMultiModalProcessor
    return processor(info, dummy_inputs, **options)


@MULTIMODAL_REGISTRY.register_processor(
    build_processor, info=llava_next.LlavaNextProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlavaNext(PrunedModelMixin, clip_tower.ClipTowerMixin, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT whose ``embed_multimodal`` returns K rows per image."""

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[EncodedImage]:
        """Encode some of the images and return them with the requested features.

        Args:
            inputs: ``pixel_values``, ``(T, 3, H, W)`` tiles for each of the B images, and ``image_sizes``
                ``(B, 2)``, height and width in pixels.
            items: Which of the B images.
            needs: Features to capture.
        """
        pixels = list(inputs["pixel_values"][items])
        tiles = self.tile_features(torch.cat(pixels), needs)
        images = []
        for image_tiles, size in zip(pixels, inputs["image_sizes"][items], strict=True):
            images.append(self._image(tiles[: len(image_tiles)], size))
            tiles = tiles[len(image_tiles) :]
        return images

    def embed_tiles(self, pixels: Tensor) -> Any:
        """Encode and project ``(T, 3, H, W)`` tiles to ``(T, n, D)``."""
        return self.multi_modal_projector(self._image_pixels_to_features(self.vision_tower, pixels))

    def _image(self, tiles: Sequence[VisionFeatures], size: Tensor) -> EncodedImage:
        stacked = torch.stack([tile.projected for tile in tiles])
        rows = self._merge_image_patch_embeddings(size, stacked, strategy="spatial_unpad")
        source = sources(self.config, len(tiles), tiles[0].tokens, size)  # (N,)
        return self.image_of_tiles(rows, tiles, source, whole=0)


def sources(config: Any, tiles: int, tokens: int, size: Tensor) -> Tensor:
    """Return the tile and patch that each row of the merged image comes from, by letting vLLM merge indices.

    Args:
        config: The model's Hugging Face config.
        tiles: Number T of the image's tiles, including padding.
        tokens: Tokens n per tile.
        size: ``(2,)`` height and width of the image in pixels.

    Returns:
        ``(N,)`` int64 on the CPU: ``tile * n + patch``, or -1 for a newline.
    """
    indices = torch.arange(tiles * tokens, dtype=torch.float64).view(tiles, tokens, 1)
    newline = torch.full((1,), -1.0, dtype=torch.float64)
    model: Any = SimpleNamespace(config=config, image_newline=newline)
    merge = llava_next.LlavaNextForConditionalGeneration._merge_image_patch_embeddings
    merged: Tensor = merge(model, size, indices, strategy="spatial_unpad")
    return merged.flatten().long()
