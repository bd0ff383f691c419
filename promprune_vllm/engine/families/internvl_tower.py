"""Shared code of the InternVL families: tiles of one size, then the whole image as one more tile.

The tower is a ViT with a CLS token. Each token is made of 2 x 2 patches ("pixel shuffle"), whose saliency and keys
are averaged. Positions are 1-D, consecutive over the kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig

from promprune_vllm.config import Settings
from promprune_vllm.core import geometry
from promprune_vllm.core.budget import KINDS
from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.engine import families
from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin
from promprune_vllm.engine.api_server.prompt_videos import VideoShape
from promprune_vllm.engine.api_server.seen_frames import SeenFrames
from promprune_vllm.engine.families import tile_tower
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.encoder_graphs import keep_eager
from promprune_vllm.engine.worker.patch_merge import PatchMerge
from promprune_vllm.engine.worker.pruned_model import PrunedModelMixin

_VIDEO_PIXELS = ("pixel_values_flat_video", "pixel_values_videos")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, with which vLLM's own processor of the original layout normalizes."""


class InternVLProcessorMixin(PrunedProcessorMixin):
    """Placeholders of K tokens. A family implements ``image_tokens`` and ``tiles``."""

    kinds = KINDS

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of tiles that an image of this size in pixels is cut into."""
        raise NotImplementedError

    def video_shape(self, item: Any, total: int) -> VideoShape:
        """Return the shape of a video, each of whose frames is one tile."""
        return VideoShape(int(item["video_num_patches"].data), total, positions=total)

    def seen_frames(self, item: Any) -> SeenFrames:
        """Return the frames of a video as the tower gets them: each is resized to a square."""
        processor = self.info.get_hf_processor()
        side = round(processor.image_seq_length**0.5)
        pixels = next(item[name].data for name in _VIDEO_PIXELS if name in item)  # (T, 3, H, W)
        videos = processor.video_processor
        mean, std = (getattr(videos, f"image_{name}", None) for name in ("mean", "std"))
        return SeenFrames.of(pixels.permute(0, 2, 3, 1), (side, side), mean or _MEAN, std or _STD)

    def boxes(self, width: int, height: int) -> list[geometry.Box | None]:
        """Return the pixel box of each visual token: of the tiles, then of the whole image if it is one more."""
        processor = self.info.get_hf_processor()
        side = round(processor.image_seq_length**0.5)
        whole = (0.0, 0.0, float(width), float(height))
        tiles = geometry.grid(*self.tiles(width, height), whole)
        if len(tiles) > 1 and getattr(processor.image_processor, "use_thumbnail", True):
            tiles.append(whole)
        return [cell for tile in tiles for cell in geometry.grid(side, side, tile)]


class InternVLMixin(PrunedModelMixin, tile_tower.TileTowerMixin):
    """Captures features of the tower; comes before vLLM's model class. A family names the parts of its model."""

    pixels: ClassVar[str]
    """Name of the input with the ``(T, 3, H, W)`` tiles of all images."""
    video_pixels: ClassVar[str]
    """The same with the frames of all videos."""

    merge = PatchMerge(side=2, in_raster_order=True)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if families.unsupported_reason(vllm_config) is None:
            keep_eager((self.saliency_block(),))

    def saliency_block(self) -> Any:
        """Return the tower's last layer."""
        raise NotImplementedError

    def embed_tiles(self, pixels: Tensor) -> Any:
        """Encode and project ``(T, 3, H, W)`` tiles to ``(T, n, D)``."""
        model: Any = self
        return model.extract_feature(pixels)

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[EncodedImage]:
        """Encode some of the images or videos and return them with the requested features.

        Args:
            inputs: The tiles of all B images or the frames of all B videos, one after the other, and
                ``image_num_patches`` or ``video_num_patches`` ``(B,)``, how many each has.
            items: Which of the B images or videos.
            needs: Features to capture.
        """
        is_video = self.video_pixels in inputs
        pixels = inputs[self.video_pixels if is_video else self.pixels]
        counts = inputs["video_num_patches" if is_video else "image_num_patches"].tolist()
        start = sum(counts[: items.start])
        tiles = self.tile_features(pixels[start : start + sum(counts[items])], needs)
        images = []
        for count in counts[items]:
            images.append(self.video_of_frames(tiles[:count]) if is_video else self._image(tiles[:count]))
            tiles = tiles[count:]
        return images

    def _image(self, tiles: Sequence[VisionFeatures]) -> EncodedImage:
        rows = torch.cat([tile.projected for tile in tiles])
        return self.image_of_tiles(rows, tiles, torch.arange(len(rows)), whole=-1)


def unsupported_reason(vllm_config: VllmConfig) -> str | None:
    """Return why an InternVL cannot be pruned because of how its tokens are laid out, or ``None``."""
    config = vllm_config.model_config.hf_config
    if getattr(config, "ps_version", "v2") == "v1":
        return "with ps_version v1, the tokens of a tile are ordered by columns"
    if config.downsample_ratio != 0.5:
        return f"its tokens are not made of 2 x 2 patches (downsample_ratio={config.downsample_ratio})"
    multimodal = vllm_config.model_config.multimodal_config
    options = getattr(multimodal, "mm_processor_kwargs", None) or {}
    has_whole = options.get("use_thumbnail", getattr(config, "use_thumbnail", True))
    if Settings.from_environment().tiles == "base" and not has_whole:
        return "PROMPRUNE_TILES=base needs a tile with the whole image, and use_thumbnail is false"
    return None
