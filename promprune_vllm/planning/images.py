"""Counts a model's visual tokens for an image, from its configuration and the image's size alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from promprune_vllm.errors import PlanError

Config = Mapping[str, Any]
# Pixel limits (min, max) of the published image processors, for models without a processor configuration.
_QWEN2_PIXELS, _QWEN3_PIXELS = (3136, 12_845_056), (65_536, 16_777_216)
_GLM_PIXELS = (12_544, 11_760_000)  # over the two frames that an image is repeated in
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
    if config.get("model_type") in ("llava_next", "llava_onevision"):
        return patches_of_tile(config) * _tiles(config, width, height)
    return patches_of(config, visual_tokens(config, processor, width, height))


def patches_of(config: Config, tokens: int) -> int:
    """Return the patches that visual tokens are made of, in models where all have equally many."""
    if "spatial_merge_size" in config["vision_config"]:
        return tokens * int(config["vision_config"]["spatial_merge_size"]) ** 2
    return int(tokens / config.get("downsample_ratio", 1) ** 2)


def patches_of_tile(config: Config) -> int:
    """Return the patches of a tile, in models with tiles of one size."""
    return _side(config) ** 2


def _side(config: Config) -> int:
    """Return the patches of a tile along each axis."""
    return _tile_size(config) // _length(config["vision_config"]["patch_size"])


def _tile_size(config: Config) -> int:
    return _length(config["vision_config"]["image_size"])


def _length(value: Any) -> int:
    """Return a length that some configurations give as height and width."""
    return int(value if isinstance(value, int) else value[0])


def _llava(config: Config, _: Config, __: int, ___: int) -> int:
    return _side(config) ** 2


def _tiles(config: Config, width: int, height: int) -> int:
    best = _resolution(config, width, height)
    size = _tile_size(config)
    return 1 + (best[0] // size) * (best[1] // size)


def _resolution(config: Config, width: int, height: int) -> tuple[int, int]:
    """Return the canvas (height, width) that shows the most pixels of the image; on a tie, the least waste."""

    def fit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - canvas[0] * canvas[1]

    return max(((int(h), int(w)) for h, w in config["image_grid_pinpoints"]), key=fit)


def _llava_next(config: Config, _: Config, width: int, height: int) -> int:
    rows, columns = _crops(config, width, height)
    return _side(config) ** 2 + rows * columns + rows  # a newline ends each row


def _llava_onevision(config: Config, _: Config, width: int, height: int) -> int:
    rows, columns = _crops(config, width, height)
    # vLLM shrinks crops of more patches than nine tiles have, whatever the configuration says.
    ratio = math.sqrt(rows * columns / (9 * _side(config) ** 2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return _side(config) ** 2 + rows * columns + rows


def _no_images(config: Config, _: Config, __: int, ___: int) -> int:
    raise PlanError(f"Models of type {config['model_type']!r} take no images: give --video instead of --image.")


def _crops(config: Config, width: int, height: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image's crops, without padding."""
    side, size = _side(config), _tile_size(config)
    canvas = _resolution(config, width, height)
    rows, columns = side * (canvas[0] // size), side * (canvas[1] // size)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    return rows, columns


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


def _internvl(config: Config, processor: Config, width: int, height: int) -> int:
    least, most = int(processor.get("min_patches", 1)), int(processor.get("max_patches", 12))
    arrangements = [
        (across, down)
        for across in range(1, most + 1)
        for down in range(1, most + 1)
        if least <= across * down <= most
    ]
    tile = int((processor.get("size") or {}).get("height") or _tile_size(config))
    tiles = _best_arrangement(arrangements, tile, width, height)
    return tokens_of_tiles(config, tiles + (tiles > 1))


def _internvl_chat(config: Config, _: Config, width: int, height: int) -> int:
    is_cut = config["dynamic_image_size"]
    least, most = (int(config[f"{name}_dynamic_patch"]) if is_cut else 1 for name in ("min", "max"))
    # The order of a set decides between arrangements that fit equally well, there as here.
    arrangements = {
        (across, down)
        for tiles in range(least, most + 1)
        for across in range(1, tiles + 1)
        for down in range(1, tiles + 1)
        if least <= across * down <= most
    }
    tiles = _best_arrangement(arrangements, _tile_size(config), width, height)
    return tokens_of_tiles(config, tiles + (tiles > 1 and bool(config["use_thumbnail"])))


def _best_arrangement(arrangements: Iterable[tuple[int, int]], tile: int, width: int, height: int) -> int:
    """Return the tiles of the arrangement with the aspect ratio nearest to the image's.

    Of equal ones it is the last whose pixels are less than twice the image's.

    Args:
        arrangements: Tiles across and down.
        tile: Width and height of a tile in pixels.
        width, height: Image size in pixels.
    """
    best, best_difference = 1, float("inf")
    for across, down in sorted(arrangements, key=lambda each: each[0] * each[1]):
        difference = abs(width / height - across / down)
        fills = width * height > 0.5 * tile**2 * across * down
        if difference < best_difference or (difference == best_difference and fills):
            best, best_difference = across * down, difference
    return best


def tokens_of_tiles(config: Config, tiles: int) -> int:
    """Return the visual tokens of so many of InternVL's tiles."""
    return tiles * int(_side(config) ** 2 * config["downsample_ratio"] ** 2)


def _glm4v(config: Config, processor: Config, width: int, height: int) -> int:
    from transformers.models.glm4v.image_processing_glm4v import smart_resize

    vision, size = config["vision_config"], processor.get("size") or {}
    step = int(vision["patch_size"]) * int(vision["spatial_merge_size"])
    frames = int(vision["temporal_patch_size"])
    high, wide = smart_resize(
        num_frames=frames,
        height=height,
        width=width,
        temporal_factor=frames,
        factor=step,
        min_pixels=int(size.get("shortest_edge") or _GLM_PIXELS[0]),
        max_pixels=int(size.get("longest_edge") or _GLM_PIXELS[1]),
    )
    return int(high // step) * int(wide // step)


COUNTERS: Mapping[str, Callable[[Config, Config, int, int], int]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _no_images,
    **dict.fromkeys(_QWEN_PIXELS, _qwen),
    "internvl": _internvl,
    "internvl_chat": _internvl_chat,
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm_ocr"), _glm4v),
}
"""Functions that count visual tokens, by ``model_type``."""
