"""LLaVA-OneVision: a SigLIP tower; images in tiles, as LLaVA-NeXT has them, and videos as one run of tokens.

SigLIP has no CLS token: the saliency of a patch is the attention that it receives from all patches of its tile in
the layer that feeds the projector. vLLM shrinks the crops of a large image and every frame of a video after it has
projected them. What is captured of their patches is shrunk in the same way, before any projection: a row that a
method merged is projected from that, so there it is not exactly vLLM's.

Newlines, those that end the rows of the crops and the one that ends a video, are kept only if the budget exceeds
all visual tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import SiglipVisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape
from vllm.config import VllmConfig
from vllm.model_executor.models import llava_onevision as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor

from promprune_vllm.core import geometry
from promprune_vllm.core.budget import KINDS
from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin
from promprune_vllm.engine.api_server.prompt_videos import VideoShape
from promprune_vllm.engine.api_server.seen_frames import SeenFrames
from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families import clip_tower
from promprune_vllm.engine.families.tile_tower import indices
from promprune_vllm.engine.worker.encoded_image import EncodedImage, Group
from promprune_vllm.engine.worker.pruned_model import PrunedModelMixin

seams.require(parts.LLAVA_ONEVISION)


def unsupported_reason(vllm_config: VllmConfig) -> str | None:
    """Return why this LLaVA-OneVision cannot be pruned, or ``None``."""
    return _unsupported_tower(vllm_config.model_config.hf_config)


def _unsupported_tower(hf_config: Any) -> str | None:
    if not isinstance(hf_config.vision_config, SiglipVisionConfig):
        return f"its vision tower is {hf_config.vision_config.model_type}; only SigLIP is supported"
    if not isinstance(hf_config.vision_feature_layer, int):
        return f"it mixes the vision layers {hf_config.vision_feature_layer}; only a single layer is supported"
    if hf_config.vision_feature_select_strategy != "full":
        strategy = hf_config.vision_feature_select_strategy
        return f"it drops the first patch of every tile (vision_feature_select_strategy={strategy!r})"
    return None


class PrunedLlavaOnevisionProcessor(PrunedProcessorMixin, upstream.LlavaOnevisionMultiModalProcessor):
    """Placeholders of K tokens."""

    kinds = KINDS

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:  # noqa: ARG002
        """Return how many visual tokens an image has in vLLM."""
        size = images.get_image_size(index)
        return int(self.info.get_num_image_tokens(image_width=size.width, image_height=size.height))

    def video_shape(self, item: Any, total: int) -> VideoShape:
        """Return the shape of a video, each of whose frames is one tile."""
        return VideoShape(len(item["pixel_values_videos"].data), total, positions=total)

    def seen_frames(self, item: Any) -> SeenFrames:
        """Return the frames of a video as the tower gets them."""
        return SeenFrames.of_squares(item["pixel_values_videos"].data, self.info)

    def boxes(self, width: int, height: int) -> list[geometry.Box | None]:
        """Return the pixel box of each token: of the whole image, then of the crops; ``None`` for newlines."""
        config = self.info.get_hf_config()
        places = Places.of(config, (height, width))
        pixels = config.vision_config.image_size
        left, top, right, bottom = geometry.padded(width, height, (places.columns * pixels, places.rows * pixels))
        across = (right - left) / (places.columns * places.side)  # pixels of a patch
        down = (bottom - top) / (places.rows * places.side)
        boxes: list[geometry.Box | None] = [
            *geometry.grid(places.side, places.side, (0.0, 0.0, float(width), float(height)))
        ]
        for row, column in places.crops.tolist():
            high, wide = (step / 2 for step in places.steps)
            cell = (
                *(left + (column - wide) * across, top + (row - high) * down),
                *(left + (column + wide) * across, top + (row + high) * down),
            )
            boxes.append(None if row < 0 else geometry.clipped(cell, width, height))
        return boxes


def build_processor(info: Any, dummy_inputs: Any, **options: Any) -> BaseMultiModalProcessor:
    """Return our processor, or vLLM's own for a LLaVA-OneVision that cannot be pruned."""
    ours = _unsupported_tower(info.get_hf_config()) is None
    processor = PrunedLlavaOnevisionProcessor if ours else upstream.LlavaOnevisionMultiModalProcessor
    return processor(info, dummy_inputs, **options)


@MULTIMODAL_REGISTRY.register_processor(
    build_processor,
    info=upstream.LlavaOnevisionProcessingInfo,
    dummy_inputs=upstream.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(
    PrunedModelMixin, clip_tower.ClipTowerMixin, upstream.LlavaOnevisionForConditionalGeneration
):
    """LLaVA-OneVision whose ``embed_multimodal`` returns K rows per image or video."""

    class_token = None

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[EncodedImage]:
        """Encode some of the images or videos and return them with the requested features.

        Args:
            inputs: ``pixel_values``, ``(T, 3, H, W)`` tiles for each of the B images, and ``image_sizes``
                ``(B, 2)``, height and width in pixels; or ``pixel_values_videos``, ``(T, 3, H, W)`` frames for
                each of the B videos.
            items: Which of the B images or videos.
            needs: Features to capture.
        """
        is_video = "pixel_values_videos" in inputs
        pixels = list(inputs["pixel_values_videos" if is_video else "pixel_values"][items])
        tiles = self.tile_features(torch.cat(pixels), needs)
        media = []
        for i, own in enumerate(pixels):
            part, tiles = tiles[: len(own)], tiles[len(own) :]
            media.append(self._video(part) if is_video else self._image(part, inputs["image_sizes"][items][i]))
        return media

    def embed_unpruned(self, **inputs: Any) -> Any:
        """Encode as vLLM does; its videos of different lengths would have one dimension too many for vLLM."""
        return [rows.flatten(0, -2) for rows in super().embed_unpruned(**inputs)]

    def embed_tiles(self, pixels: Tensor) -> Any:
        """Encode and project ``(T, 3, H, W)`` tiles to ``(T, n, D)``."""
        return self.multi_modal_projector(self._image_pixels_to_features(self.vision_tower, pixels))

    def _video(self, frames: Sequence[VisionFeatures]) -> EncodedImage:
        pooled = {name: self.apply_pooling(values) for name, values in _stacked(frames).items()}  # (T, m, ...)
        side = math.isqrt(pooled["projected"].shape[1])
        each = [_features({name: values[i] for name, values in pooled.items()}) for i in range(len(frames))]
        return self.video_of_frames(
            [VisionFeatures(**features, grid=(1, side, side)) for features in each], self.image_newline
        )

    def _image(self, tiles: Sequence[VisionFeatures], size: Tensor) -> EncodedImage:
        values = _stacked(tiles)
        rows = _merged(self.config, size.tolist(), values.pop("projected"), self.image_newline)
        captured = {
            name: _merged(self.config, size.tolist(), each, each.new_zeros(each.shape[-1]))
            for name, each in values.items()
        }
        features = VisionFeatures(projected=rows, grid=(1, 1, len(rows)), **_features(captured))
        places = Places.of(self.config, size.tolist())
        of_tile = places.tiles()
        if self.merges_tiles():
            of_tile = of_tile.clamp(max=0)
        groups = []
        lines = places.lines()
        for tile in sorted({*of_tile.tolist()} - {-1}):
            own = of_tile == tile
            where = indices(own, rows.device)
            height = 1 if self.merges_tiles() else len({*lines[own].tolist()})
            groups.append(Group(features.take(where, (1, height, where.numel() // height)), where))
        return EncodedImage(rows, self.with_entropy(groups, tiles[0]), indices(of_tile < 0, rows.device))


class Places(NamedTuple):
    """Where the tokens of an image are, as vLLM merges its tiles: the whole image, then the crops row by row.

    Args:
        rows, columns: Tiles of the canvas that the crops fill.
        side: Patches of a tile along each axis.
        crops: ``(N - n, 2)`` float64: row and column, in patches of the canvas, of the center of each token of the
            crops; negative for a newline.
    """

    rows: int
    columns: int
    side: int
    crops: Tensor

    @classmethod
    def of(cls, config: Any, size: Sequence[int]) -> Places:
        """Return the places of an image's tokens, by letting vLLM merge those of its patches.

        Args:
            config: The model's Hugging Face config.
            size: Height and width of the image in pixels.
        """
        pixels = config.vision_config.image_size
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, pixels)
        side = pixels // config.vision_config.patch_size
        patch, tile = torch.arange(side**2), torch.arange(rows * columns)[:, None]
        down, across = tile // columns * side + patch // side, tile % columns * side + patch % side
        canvas = torch.stack([down, across], dim=-1).double()  # (tiles, n, 2)
        # The first tile shows the whole image.
        merged = _merged(config, size, torch.cat([canvas[:1], canvas]), torch.full((2,), -1.0).double())
        return cls(rows, columns, side, merged[side**2 :] + 0.5)

    @property
    def width(self) -> int:
        """Tokens in a row of the crops, without the newline."""
        return int((self.crops[:, 0] < 0).nonzero()[0])

    @property
    def steps(self) -> tuple[float, float]:
        """Height and width in patches of a token of the crops."""
        width = self.width
        down, across = self.crops[:: width + 1, 0], self.crops[:width, 1]
        return _mean_step(down), _mean_step(across)

    def lines(self) -> Tensor:
        """Return ``(N,)`` int64, the row of each token in the whole image or in the crops."""
        whole = torch.arange(self.side**2) // self.side
        return torch.cat([whole, torch.arange(len(self.crops)) // (self.width + 1)])

    def tiles(self) -> Tensor:
        """Return ``(N,)`` int64, the tile in which each token's center is, 0 for the whole image; -1 for newlines.

        A token at the edge of a tile may also have values of the tile beside it.
        """
        # All tokens of a row belong to one row of tiles, however interpolation rounds.
        row, column = ((self.crops + 1e-6) // self.side).long().unbind(-1)
        crops = (1 + row * self.columns + column).masked_fill(self.crops[:, 0] < 0, -1)
        return torch.cat([crops.new_zeros(self.side**2), crops])


def _mean_step(centers: Tensor) -> float:
    return float((centers[-1] - centers[0]) / (len(centers) - 1)) if len(centers) > 1 else 1.0


def _merged(config: Any, size: Sequence[int], tiles: Tensor, newline: Tensor) -> Tensor:
    """Return ``(N, W)`` values of an image's tokens as vLLM merges ``(T, n, W)`` values of its tiles' patches."""
    merge = upstream.LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings
    model: Any = SimpleNamespace(config=config, image_newline=newline)
    merged: Tensor = merge(model, torch.tensor(size), tiles, image_newline=newline, strategy="spatial_unpad")
    return merged


def _stacked(tiles: Sequence[VisionFeatures]) -> dict[str, Tensor]:
    """Return what was captured of T tiles: ``(T, n, W)``, with W = 1 for the saliency."""
    names = [name for name in ("projected", "saliency", "encoder", "keys") if getattr(tiles[0], name) is not None]
    stacked = {name: torch.stack([getattr(tile, name) for tile in tiles]) for name in names}
    return {name: values[..., None] if values.ndim == 2 else values for name, values in stacked.items()}


def _features(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return ``(N, W)`` values by name as ``VisionFeatures`` has them."""
    return {name: each[:, 0] if name == "saliency" else each for name, each in values.items()}
