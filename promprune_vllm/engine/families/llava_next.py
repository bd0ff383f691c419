"""LLaVA-NeXT: the whole image as one tile, and its crops at full resolution, stitched and without padding.

The budget is for the whole image with its crops. It is split over the tiles in proportion to their valid tokens,
and each tile is pruned on its own (``PROMPRUNE_TILES`` has other ways). vLLM ends every row of the stitched crops
with a learned newline; newlines are kept only when the budget exceeds all visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from promprune_vllm.engine.compat import model_names, versions
from promprune_vllm.engine.families import clip_tower
from promprune_vllm.engine.worker.encoded_image import EncodedImage, Group
from promprune_vllm.engine.worker.pruned_model import PrunedModelMixin

versions.require_names(model_names.LLAVA_NEXT_NAMES)


def unsupported_reason(vllm_config: VllmConfig) -> str | None:
    """Return why this LLaVA-NeXT cannot be pruned, or ``None``."""
    return clip_tower.unsupported_tower(vllm_config.model_config.hf_config)


class PrunedLlavaNextProcessor(PrunedProcessorMixin, llava_next.LlavaNextMultiModalProcessor):
    """Placeholders of K tokens."""

    supplies = clip_tower.SUPPLIES

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:  # noqa: ARG002
        """Return how many visual tokens vLLM makes of an image."""
        size = images.get_image_size(index)
        return int(self.info.get_num_image_tokens(image_width=size.width, image_height=size.height))

    def boxes(self, width: int, height: int) -> list[geometry.Box | None]:
        """Where on the image each of its tokens looks: as one tile, then in crops; a newline nowhere."""
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
        """Encode some of the images and return what a method may look at.

        Args:
            inputs: ``pixel_values``, ``(T, 3, H, W)`` tiles for each of the B images, and ``image_sizes``
                ``(B, 2)``, height and width in pixels.
            items: Which of the B images.
            needs: What the method asks for.
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
        groups = [_merged(tiles, source)] if self._settings.tiles == "merged" else _tile_groups(tiles, source)
        if self._settings.tiles == "base":
            # Settings admit this for PromPrune alone, which has an entropy.
            method: Any = self._methods[0]
            entropy = method.entropy_of(tiles[0])
            groups = [Group(replace(group.features, entropy=entropy), group.positions) for group in groups]
        return EncodedImage(rows, groups, _where(source < 0, rows.device))


def sources(config: Any, tiles: int, tokens: int, size: Tensor) -> Tensor:
    """Return where each row of the merged image comes from, by letting vLLM merge indices.

    Args:
        config: The model's, of Hugging Face.
        tiles: T of the image, padding included.
        tokens: n of one tile.
        size: ``(2,)`` height and width of the image in pixels.

    Returns:
        ``(N,)`` int64 on the CPU: ``tile * n + patch``, or -1 for a newline.
    """
    indices = torch.arange(tiles * tokens, dtype=torch.float64).view(tiles, tokens, 1)
    newline = torch.full((1,), -1.0, dtype=torch.float64)
    stand_in: Any = SimpleNamespace(config=config, image_newline=newline)
    merge = llava_next.LlavaNextForConditionalGeneration._merge_image_patch_embeddings
    merged: Tensor = merge(stand_in, size, indices, strategy="spatial_unpad")
    return merged.flatten().long()


def _tile_groups(tiles: Sequence[VisionFeatures], source: Tensor) -> list[Group]:
    """One group for each tile that has valid tokens, which form a rectangle of it."""
    groups = []
    for i, tile in enumerate(tiles):
        here = (source >= i * tile.tokens) & (source < (i + 1) * tile.tokens)
        patches = source[here] - i * tile.tokens
        if patches.numel():
            side = tile.grid[2]
            height = int(patches[-1] // side - patches[0] // side) + 1
            grid = (1, height, patches.numel() // height)
            groups.append(Group(tile.take(patches, grid), _where(here, tile.projected.device)))
    return groups


def _merged(tiles: Sequence[VisionFeatures], source: Tensor) -> Group:
    """All tiles as one group in the order of the prompt, without a grid: a method sees one line of tokens."""
    shares = [
        # CLS pays about the same attention to every tile; as shares of it, tokens of different tiles compare.
        replace(tile, saliency=None if tile.saliency is None else tile.saliency / tile.saliency.sum())
        for tile in tiles
    ]
    everything = VisionFeatures.join(shares)
    visual = source[source >= 0]
    return Group(everything.take(visual, (1, 1, visual.numel())), _where(source >= 0, everything.projected.device))


def _where(mask: Tensor, device: torch.device) -> Tensor:
    return mask.nonzero().flatten().to(device)
