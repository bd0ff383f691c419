"""LLaVA-NeXT-Video: a CLIP tower; a video is one run of tokens, and there are no images.

vLLM shrinks every frame before it projects it. The saliency and the keys of its patches are shrunk in the same
way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models import llava_next_video as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor

from promprune_vllm.core.budget import VIDEO
from promprune_vllm.core.features import Need
from promprune_vllm.core.geometry import Box
from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin
from promprune_vllm.engine.api_server.prompt_videos import VideoShape
from promprune_vllm.engine.api_server.seen_frames import SeenFrames
from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families import clip_tower
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.patch_merge import PatchMerge
from promprune_vllm.engine.worker.pruned_model import PrunedModelMixin
from promprune_vllm.errors import BudgetError

seams.require(parts.CLIP, parts.LLAVA_NEXT_VIDEO)


def unsupported_reason(vllm_config: VllmConfig) -> str | None:
    """Return why this LLaVA-NeXT-Video cannot be pruned, or ``None``."""
    return clip_tower.unsupported_tower(vllm_config.model_config.hf_config)


class PrunedLlavaNextVideoProcessor(PrunedProcessorMixin, upstream.LlavaNextVideoMultiModalProcessor):
    """Placeholders of K tokens."""

    kinds = (VIDEO,)

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:  # noqa: ARG002
        """Refuse: there are no images."""
        raise _no_images()

    def boxes(self, width: int, height: int) -> list[Box | None]:  # noqa: ARG002
        """Refuse: there are no images."""
        raise _no_images()

    def video_shape(self, item: Any, total: int) -> VideoShape:
        """Return the shape of a video, each of whose frames is one tile."""
        return VideoShape(len(item["pixel_values_videos"].data), total, positions=total)

    def seen_frames(self, item: Any) -> SeenFrames:
        """Return the frames of a video as the tower gets them."""
        return SeenFrames.of_squares(item["pixel_values_videos"].data, self.info)


def _no_images() -> BudgetError:
    return BudgetError("LLaVA-NeXT-Video takes no images, only videos: send a video.", reason="unsupported")


def build_processor(info: Any, dummy_inputs: Any, **options: Any) -> BaseMultiModalProcessor:
    """Return our processor, or vLLM's own for a LLaVA-NeXT-Video that cannot be pruned."""
    ours = clip_tower.unsupported_tower(info.get_hf_config()) is None
    processor = PrunedLlavaNextVideoProcessor if ours else upstream.LlavaNextVideoMultiModalProcessor
    return processor(info, dummy_inputs, **options)


@MULTIMODAL_REGISTRY.register_processor(
    build_processor,
    info=upstream.LlavaNextVideoProcessingInfo,
    dummy_inputs=upstream.LlavaNextVideoDummyInputsBuilder,
)
class PrunedLlavaNextVideo(
    PrunedModelMixin, clip_tower.ClipTowerMixin, upstream.LlavaNextVideoForConditionalGeneration
):
    """LLaVA-NeXT-Video whose ``embed_multimodal`` returns K rows per video."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.merge = PatchMerge(self.config.spatial_pool_stride, in_raster_order=True)

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[EncodedImage]:
        """Encode some of the videos and return them with the requested features.

        Args:
            inputs: ``pixel_values_videos``, ``(T, 3, H, W)`` frames for each of the B videos.
            items: Which of the B videos.
            needs: Features to capture.
        """
        pixels = list(inputs["pixel_values_videos"][items])
        frames = self.tile_features(torch.cat(pixels), needs)
        videos = []
        for own in pixels:
            videos.append(self.video_of_frames(frames[: len(own)]))
            frames = frames[len(own) :]
        return videos

    def embed_tiles(self, pixels: Tensor) -> Any:
        """Encode, shrink and project ``(T, 3, H, W)`` frames to ``(T, n, D)``."""
        return self._video_pixels_to_features(self.vision_tower, pixels)

    def of_tokens(self, patches: Tensor, side: int) -> Tensor:
        """Return ``(n, ...)`` values of a frame's tokens, shrunk as vLLM shrinks the tower's rows."""
        pooled: Tensor = self.vision_resampler(patches.reshape(1, side**2, -1))[0]  # (n, W)
        return pooled.reshape(len(pooled), *patches.shape[1:])
