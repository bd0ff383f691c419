"""How many tokens an image of a megapixel has in each family: the code of vLLM and of transformers counts them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from promprune_vllm.demo import families as demo
from promprune_vllm.demo import glm_processing, llava_video, model, qwen_processing
from promprune_vllm.demo import internvl as demo_internvl
from promprune_vllm.engine import plugin
from promprune_vllm.engine.api_server.counting import _Sizes
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.families import FAMILIES
from tests.documents import README, table

pytestmark = pytest.mark.engine
SIDE = 1024
CLIP_PX = 336
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-1.6
Build = Callable[[Path, pytest.MonkeyPatch], Path]


def llava(directory: Path, _: pytest.MonkeyPatch) -> Path:
    return model.build_demo_model(directory, replace(demo.TINY_LLAVA, image_px=CLIP_PX))


def llava_next(directory: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.setattr(demo, "_LLAVA_NEXT", replace(demo.TINY_LLAVA, image_px=CLIP_PX))
    built = demo.build_family_model("llava_next", directory)
    assert json.loads((built / "config.json").read_text())["image_grid_pinpoints"] == PINPOINTS
    return built


def llava_onevision(directory: Path, patch: pytest.MonkeyPatch) -> Path:
    """With the published size of tiles, and their grids: from 1 x 1 to 6 x 6."""
    patch.setattr(llava_video, "_ONEVISION_PX", 384)
    patch.setattr(llava_video, "_MAX_TILES", 6)
    return demo.build_family_model("llava_onevision", directory)


def qwen(kind: str, least: int, most: int, directory: Path, patch: pytest.MonkeyPatch) -> Path:
    """With the published limits of pixels, in tokens; the sizes of patches and tokens are always the published."""
    patch.setattr(qwen_processing, "_MIN_TOKENS", least)
    patch.setattr(qwen_processing, "_MAX_TOKENS", most)
    return demo.build_family_model(kind, directory)


def internvl(kind: str, directory: Path, patch: pytest.MonkeyPatch) -> Path:
    """With the published size of tiles, and number of them."""
    tile, tiles = 448, 12
    for name, value in (("_TILE_PX", tile), ("_TILE_TOKENS", 256), ("_MAX_TILES", tiles)):
        patch.setattr(demo_internvl, name, value)
    patch.setattr(demo_internvl, "_TOWER", {**demo_internvl._TOWER, "image_size": tile})
    chat = {**demo_internvl._CHAT, "force_image_size": tile, "max_dynamic_patch": tiles}
    patch.setattr(demo_internvl, "_CHAT", chat)
    return demo.build_family_model(kind, directory)


def glm(kind: str, directory: Path, patch: pytest.MonkeyPatch) -> Path:
    """With the published limits of pixels, in tokens; both frames of an image count."""
    patch.setattr(glm_processing, "_MIN_TOKENS", 112 * 112 // (2 * 28**2))
    patch.setattr(glm_processing, "_MAX_TOKENS", 15_000 // 2)
    return demo.build_family_model(kind, directory)


PUBLISHED: Mapping[str, Build] = {
    "Llava": llava,
    "LlavaNext": llava_next,
    "LlavaOnevision": llava_onevision,
    "Qwen2VL": partial(qwen, "qwen2_vl", 3136 // 28**2, 12_845_056 // 28**2),
    "Qwen2_5_VL": partial(qwen, "qwen2_5_vl", 3136 // 28**2, 12_845_056 // 28**2),
    "Qwen3VL": partial(qwen, "qwen3_vl", 65_536 // 32**2, 16_777_216 // 32**2),
    "Qwen3VLMoe": partial(qwen, "qwen3_vl_moe", 65_536 // 32**2, 16_777_216 // 32**2),
    "Qwen3_5": partial(qwen, "qwen3_5", 65_536 // 32**2, 16_777_216 // 32**2),
    "Qwen3_5Moe": partial(qwen, "qwen3_5_moe", 65_536 // 32**2, 16_777_216 // 32**2),
    "InternVLChatModel": partial(internvl, "internvl_chat"),
    "InternVL": partial(internvl, "internvl"),
    "Glm4v": partial(glm, "glm4v"),
    "Glm4vMoe": partial(glm, "glm4v_moe"),
    "GlmOcr": partial(glm, "glm_ocr"),
}
"""Class of the model -> a tiny checkpoint that cuts images as the published ones do."""


@pytest.mark.parametrize("architecture", [name for name, family in FAMILIES.items() if family.megapixel_tokens])
def test_a_megapixel_has_the_tokens_that_the_table_says(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoProcessor
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    plugin.register()
    build = PUBLISHED[architecture.removesuffix("ForConditionalGeneration")]
    directory = build(tmp_path / "model", monkeypatch)
    config = ModelConfig(model=str(directory), trust_remote_code=True)  # InternVL's own, written by the builder
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    counted = processor.count(_Sizes([(SIDE, SIDE)]), PruningRequest())
    expected = FAMILIES[architecture].megapixel_tokens
    assert counted == [(expected, expected)]
    alone = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    if hasattr(alone, "_get_num_multimodal_tokens"):  # transformers has no processor for InternVLChat
        (tokens,) = alone._get_num_multimodal_tokens(image_sizes=[(SIDE, SIDE)]).num_image_tokens
        around = 2 * hasattr(alone, "start_image_token")  # counted by InternVL's
        assert tokens == expected + around


def test_the_documents_say_it_of_every_model() -> None:
    shown = table("families")
    models = README.read_text().partition("\n## Is it for you?\n")[2].partition("\n## ")[0]
    for family in FAMILIES.values():
        if family.megapixel_tokens is None:
            assert f"| {family.model} | takes no images |" in shown
            continue
        assert f"| {family.model} | {family.megapixel_tokens:,} |" in shown
        name = family.model.partition(",")[0].removesuffix("-MoE")
        rows = (line.split("|") for line in models.splitlines() if line.startswith("|"))
        (row,) = (row for row in rows if name in map(str.strip, row[1].split(",")))
        assert f"{family.megapixel_tokens:,}" in row[2]
