"""Counts a model's visual tokens for an image, from its configuration and the image's size alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from promprune_vllm.errors import PlanError

Config = Mapping[str, Any]
# Pixel limits (min, max) of the published image processors, for models without a processor configuration.
_QWEN2_PIXELS, _QWEN3_PIXELS = (3136, 12_845_056), (65_536, 16_777_216)
_QWEN_PIXELS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2_PIXELS),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN3_PIXELS),
}


def visual_tokens(config: Config, processor: Config, width: int, height: int) -> int:
    """Return the visual tokens of an image before pruning.

    Args:
        config: The model's config.json.
        processor: Configuration of its image processor, or empty.
        width, height: Image size in pixels.

    Raises:
        PlanError: The model type is not supported.
    """
    kind = str(config.get("model_type"))
    if kind not in COUNTERS:
        raise PlanError(
            f"Visual tokens of model type {kind!r} cannot be counted; supported types are {', '.join(COUNTERS)}."
        )
    return COUNTERS[kind](config, processor, width, height)


def patches(config: Config, processor: Config, width: int, height: int) -> int:
    """Return the number of patches that the vision tower encodes for an image, over all tiles."""
    kind = str(config.get("model_type"))
    if kind.startswith("qwen"):
        return (
            visual_tokens(config, processor, width, height)
            * int(config["vision_config"]["spatial_merge_size"]) ** 2
        )
    return _side(config) ** 2 * (_tiles(config, width, height) if kind == "llava_next" else 1)


def _side(config: Config) -> int:
    vision = config["vision_config"]
    return int(vision["image_size"]) // int(vision["patch_size"])


def _llava(config: Config, _: Config, __: int, ___: int) -> int:
    return _side(config) ** 2


def _tiles(config: Config, width: int, height: int) -> int:
    best = _resolution(config, width, height)
    size = int(config["vision_config"]["image_size"])
    return 1 + (best[0] // size) * (best[1] // size)


def _resolution(config: Config, width: int, height: int) -> tuple[int, int]:
    """Return the canvas (height, width) that shows the most pixels of the image; on a tie, the least waste."""

    def fit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - canvas[0] * canvas[1]

    return max(((int(h), int(w)) for h, w in config["image_grid_pinpoints"]), key=fit)


def _llava_next(config: Config, _: Config, width: int, height: int) -> int:
    side, size = _side(config), int(config["vision_config"]["image_size"])
    canvas = _resolution(config, width, height)
    rows, columns = side * (canvas[0] // size), side * (canvas[1] // size)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    return side**2 + rows * columns + rows  # a newline ends each row


def _qwen(config: Config, processor: Config, width: int, height: int) -> int:
    vision = config["vision_config"]
    step = int(vision["patch_size"]) * int(vision["spatial_merge_size"])
    size = processor.get("size") or {}
    least, most = _QWEN_PIXELS[str(config["model_type"])]
    least = int(processor.get("min_pixels") or size.get("shortest_edge") or least)
    most = int(processor.get("max_pixels") or size.get("longest_edge") or most)
    high, wide = max(step, round(height / step) * step), max(step, round(width / step) * step)
    if high * wide > most:
        shrink = (height * width / most) ** 0.5
        high, wide = (max(step, int(side / shrink / step) * step) for side in (height, width))
    elif high * wide < least:
        grow = (least / (height * width)) ** 0.5
        high, wide = (-int(-side * grow // step) * step for side in (height, width))
    return (high // step) * (wide // step)


COUNTERS: Mapping[str, Callable[[Config, Config, int, int], int]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    **dict.fromkeys(_QWEN_PIXELS, _qwen),
}
"""Functions that count visual tokens, by ``model_type``."""
