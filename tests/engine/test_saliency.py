"""The saliency of every tower against eager attention of transformers, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.family_engine import FAMILY_ENGINES, SHAPES, FamilyEngine
from tests.engine.test_families import engine  # noqa: F401  a fixture

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
# Of an image's largest saliency, and of a token's own: two towers round queries and keys in ways of their own.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.05, 0.1)}


@pytest.mark.parametrize("shape", SHAPES)
def test_saliency_equals_eager_attention_of_transformers(engine: FamilyEngine, shape: str) -> None:  # noqa: F811
    ours = [group.features.saliency for group in engine.encoded(shape).groups]
    reference = _clip if engine.family == "llava_next" else _qwen
    wanted, other_layer = reference(engine, shape)
    assert len(ours) == len(wanted)
    of_largest, of_own = TOLERANCES[engine.llm.model_config.dtype]
    for saliency, truth, other in zip(ours, wanted, other_layer, strict=True):
        assert float((saliency - truth).abs().max() / truth.max()) < of_largest
        assert float(((saliency - truth) / truth).abs().max()) < of_own
        if len(truth) > 1:
            difference = ((saliency - other) / truth).abs().max()
            assert float(difference) > 10 * of_own, "the wrong layer would pass as well"


def _qwen(engine: FamilyEngine, shape: str) -> tuple[list[Tensor], list[Tensor]]:  # noqa: F811
    """Received attention in the last block of full attention, and in the block before it."""
    maps = _attention_maps(engine, shape)
    config = engine.llm.model_config.hf_config.vision_config
    last = max(config.fullatt_block_indexes) if engine.family == "qwen2_5_vl" else len(maps) - 1
    assert last == len(maps) - 1
    return [_received(maps[last], engine, shape)], [_received(maps[last - 1], engine, shape)]


def _received(attention: list[Tensor], engine: FamilyEngine, shape: str) -> Tensor:  # noqa: F811
    """Mean over heads and queries, over each token's four patches, in raster order, from whole maps."""
    columns = torch.cat([each.double().mean(dim=(0, 1, 2)) * each.shape[-1] for each in attention])
    per_token = columns.view(-1, 4).mean(dim=1) / len(columns)  # of windows: as if each were a share of the image
    if engine.family != "qwen2_5_vl":
        return per_token.float()
    _, height, width = engine.inputs(shape)["image_grid_thw"][0].tolist()
    raster = torch.empty_like(per_token)
    raster[_window_order(height // 2, width // 2, side=4)] = per_token
    return raster.float()


def _window_order(height: int, width: int, side: int) -> Tensor:
    """Raster index of each token in the order of windows: window by window, row by row."""
    order = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            for row in range(top, min(top + side, height)):
                order += [row * width + column for column in range(left, min(left + side, width))]
    return torch.tensor(order)


def _attention_maps(engine: FamilyEngine, shape: str) -> list[list[Tensor]]:  # noqa: F811
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


def _clip(engine: FamilyEngine, shape: str) -> tuple[list[Tensor], list[Tensor]]:  # noqa: F811
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


def _valid(engine: FamilyEngine, shape: str) -> list[Tensor]:  # noqa: F811
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


def _directory(engine: FamilyEngine) -> Path:  # noqa: F811
    return Path(engine.llm.model_config.model)
