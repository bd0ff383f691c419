"""Counts a model's visual tokens for a video, from its configuration and the frames that vLLM samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from promprune_vllm.errors import PlanError
from promprune_vllm.planning import images

Config = Mapping[str, Any]
# Limits (min, max) of the pixels of all frames together, of the published video processors.
_POOLED = ("llava_onevision", "llava_next_video")  # a frame is one tile, whose rows are shrunk behind the tower
_QWEN3_PIXELS, _GLM_PIXELS = (4096, 25_165_824), (12_544, 47_040_000)


def grid(config: Config, processor: Config, frames: int, width: int, height: int) -> tuple[int, int]:
    """Return the frames that the model has of a video, and the visual tokens of each before pruning.

    Args:
        config: The model's config.json.
        processor: Configuration of its video processor, or empty.
        frames: Frames that vLLM samples.
        width, height: Size of the frames in pixels.

    Raises:
        PlanError: The model takes no videos.
    """
    kind, vision = str(config.get("model_type")), config["vision_config"]
    if kind.startswith("internvl"):
        return frames, images.tokens_of_tiles(config, 1)
    if kind in _POOLED:
        stride = int(config.get("spatial_pool_stride", 2))
        return frames, math.ceil(math.isqrt(images.patches_of_tile(config)) / stride) ** 2
    if not kind.startswith(("qwen", "glm")):
        raise PlanError(f"Models of type {kind!r} take no videos: give --image instead of --video.")
    merged = int(vision["temporal_patch_size"])
    count = -(-frames // merged)
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        return count, images.visual_tokens(config, processor, width, height)
    limits = _GLM_PIXELS if kind.startswith("glm") else _QWEN3_PIXELS
    return count, _of_volume(vision, processor, limits, (max(frames, merged), width, height))


def newlines(config: Config) -> int:
    """Return the visual tokens of a video that are in no frame."""
    return int(config.get("model_type") == "llava_onevision")


def patches(config: Config, tokens: int) -> int:
    """Return the patches of a frame with so many tokens."""
    if config.get("model_type") in _POOLED:
        return images.patches_of_tile(config)
    return images.patches_of(config, tokens)


def _of_volume(vision: Config, processor: Config, limits: tuple[int, int], video: tuple[int, int, int]) -> int:
    """Return the tokens of a frame where the processor limits the pixels of all frames together."""
    from transformers.models.glm4v.image_processing_glm4v import smart_resize

    size = processor.get("size") or {}
    step, (frames, width, height) = int(vision["patch_size"]) * int(vision["spatial_merge_size"]), video
    high, wide = smart_resize(
        num_frames=frames,
        height=height,
        width=width,
        temporal_factor=int(vision["temporal_patch_size"]),
        factor=step,
        min_pixels=int(size.get("shortest_edge") or limits[0]),
        max_pixels=int(size.get("longest_edge") or limits[1]),
    )
    return int(high // step) * int(wide // step)
