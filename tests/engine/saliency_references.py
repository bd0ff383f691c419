"""The saliency of a vision tower according to eager attention of transformers, on the weights that vLLM holds.

Every reference takes an engine and the shape of an image, and returns ``PerGroup``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.engine.family_engine import FamilyEngine

PerGroup = tuple[list[Tensor], list[Tensor]]
"""The saliency of each group of tokens, ``(N,)`` float32; and that of the layer before the right one."""


def received_by_patches(engine: FamilyEngine, shape: str) -> PerGroup:
    """Attention that a token's patches receive in the last block, and in the block before it."""
    maps = _attention_maps(engine, shape)
    return [_received(maps[-1])], [_received(maps[-2])]


def received_in_window_order(engine: FamilyEngine, shape: str) -> PerGroup:
    """The same of a tower that has its tokens in the order of windows; its last block has full attention."""
    config = engine.llm.model_config.hf_config.vision_config
    maps = _attention_maps(engine, shape)
    assert max(config.fullatt_block_indexes) == len(maps) - 1
    _, height, width = engine.inputs(shape)["image_grid_thw"][0].tolist()
    order = _window_order(height // 2, width // 2, side=4)

    def raster(values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy_(0, order, values)

    return [raster(_received(maps[-1]))], [raster(_received(maps[-2]))]


def _received(attention: list[Tensor]) -> Tensor:
    """Mean over heads and queries, over each token's four patches, from whole maps."""
    columns = torch.cat([each.double().mean(dim=(0, 1, 2)) * each.shape[-1] for each in attention])
    # Of windows: as if each were a share of the image.
    return (columns.view(-1, 4).mean(dim=1) / len(columns)).float()


def _window_order(height: int, width: int, side: int) -> Tensor:
    """Raster index of each token in the order of windows: window by window, row by row."""
    order = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            for row in range(top, min(top + side, height)):
                order += [row * width + column for column in range(left, min(left + side, width))]
    return torch.tensor(order)


def _attention_maps(engine: FamilyEngine, shape: str) -> list[list[Tensor]]:
    """Every block's attention maps ``(1, H, P, P)``, one for each image or window."""
    from transformers import AttentionInterface, AutoModelForImageTextToText
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

    seen: dict[int, list[Tensor]] = {}

    def recording(module: Any, *arguments: Any, **options: Any) -> Any:
        output, weights = eager_attention_forward(module, *arguments, **options)
        seen.setdefault(id(module), []).append(weights)
        return output, weights

    AttentionInterface.register("recording", recording)
    dtype = engine.llm.model_config.dtype  # the weights are those that vLLM holds
    model = AutoModelForImageTextToText.from_pretrained(_directory(engine), dtype=dtype).float()
    tower = model.model.visual
    tower.set_attn_implementation("recording")
    inputs = engine.inputs(shape, raw=False)
    with torch.inference_mode():
        tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return [seen[id(block.attn)] for block in tower.blocks]


def paid_by_cls(engine: FamilyEngine, shape: str) -> PerGroup:
    """Attention of CLS in every tile, over the tile's valid tokens; and that of the layer before."""
    from transformers import LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(
        _directory(engine), attn_implementation="eager", dtype=torch.float32
    )
    inputs = engine.inputs(shape)
    with torch.inference_mode():
        attentions = model.model.vision_tower(inputs["pixel_values"][0], output_attentions=True).attentions
    found: list[list[Tensor]] = []
    for layer in (-2, -3):
        tiles = attentions[layer][:, :, 0, 1:].mean(dim=1)  # (T, n)
        found.append([tile[mask] for tile, mask in zip(tiles, _valid(engine, shape), strict=False) if mask.any()])
    return found[0], found[1]


def received_in_tiles(engine: FamilyEngine, shape: str) -> PerGroup:
    """Attention that a patch of a tile receives, shrunk as transformers shrinks crops; and in the layer before."""
    from transformers import LlavaOnevisionForConditionalGeneration

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        _directory(engine), attn_implementation="eager", dtype=torch.float32
    )
    inputs = engine.inputs(shape)
    with torch.inference_mode():
        attentions = model.model.vision_tower(inputs["pixel_values"][0], output_attentions=True).attentions
    size = inputs["image_sizes"]
    found = []
    for layer in (-1, -2):
        tiles = attentions[layer].mean(dim=(1, 2))  # (T, n)
        (packed,), _ = model.model.pack_image_features([tiles[..., None]], size)
        crops = packed[tiles.shape[1] :, 0]
        of_tile = _tiles_of_crops(engine, size[0].tolist(), len(crops))
        found.append([tiles[0], *(crops[of_tile == tile] for tile in of_tile.unique())])
    return found[0], found[1]


def _tiles_of_crops(engine: FamilyEngine, size: list[int], tokens: int) -> Tensor:
    """The tile that holds the middle of each of the crops' tokens, which may be fewer than their patches."""
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        get_anyres_image_grid_shape,
        unpad_image,
    )

    config = engine.llm.model_config.hf_config
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    patches = torch.arange(rows * side * columns * side).view(1, rows * side, columns * side)
    shown = unpad_image(patches, size)[0]
    top, left = divmod(int(shown[0, 0]), columns * side)
    height, width = shown.shape
    if tokens < height * width:
        ratio = (height * width / (9 * side**2)) ** 0.5
        down, across = int(height // ratio), int(width // ratio)
    else:
        down, across = height, width
    assert down * across == tokens
    row = (top + (torch.arange(down) + 0.5) * height / down) // side
    column = (left + (torch.arange(across) + 0.5) * width / across) // side
    return (row[:, None] * columns + column).flatten()


def paid_by_cls_to_squares(engine: FamilyEngine, shape: str) -> PerGroup:
    """Attention of CLS in the last layer to each token's 2 x 2 patches, tile by tile; and in the layer before."""
    from transformers import InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(
        # The checkpoint in the original layout has the same weights, and transformers has no model for it.
        _directory(engine).with_name("internvl"),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    (pixels,) = (tensor for tensor in engine.inputs(shape).values() if tensor.ndim == 4)
    with torch.inference_mode():
        attentions = model.model.vision_tower(pixels, output_attentions=True).attentions
    last, before = ([*_of_squares(attentions[layer][:, :, 0, 1:].mean(dim=1))] for layer in (-1, -2))
    return last, before


def _of_squares(tiles: Tensor) -> Tensor:
    """Mean of ``(T, side * side)`` patches row by row over 2 x 2 of them."""
    side = round(tiles.shape[1] ** 0.5)
    return torch.nn.functional.avg_pool2d(tiles.view(len(tiles), 1, side, side), 2).flatten(1)


def _valid(engine: FamilyEngine, shape: str) -> list[Tensor]:
    """Which tokens of each tile are no padding, from transformers' own unpadding of a map of ones."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    config = engine.llm.model_config.hf_config
    size = engine.inputs(shape)["image_sizes"][0].tolist()
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    places = torch.arange(rows * side * columns * side).view(1, rows * side, columns * side)
    kept = torch.zeros(places.numel(), dtype=torch.bool)
    kept[unpad_image(places, size).flatten()] = True
    tiles = kept.view(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, side * side)
    return [torch.ones(side * side, dtype=torch.bool), *tiles]


def _directory(engine: FamilyEngine) -> Path:
    return Path(engine.llm.model_config.model)
