"""Options of a request for the image processor of transformers: tokens are counted as it makes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from promprune_vllm.demo.families import build_family_model
from promprune_vllm.engine import plugin
from promprune_vllm.engine.api_server.counting import _Sizes
from tests.engine.family_prompts import processor_of

pytestmark = pytest.mark.engine
SIZE = (600, 900)
# InternVL: 2 x 3 tiles and the whole image, unless the options say otherwise.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "internvl": [
        {},
        {"max_patches": 2},
        {"max_patches": 6, "crop_to_patches": False},
        {"images_kwargs": {"max_patches": 2}},
        {"min_patches": 4, "max_patches": 4, "do_sample_frames": False},
        {},  # as at first: nothing of the other requests is left
    ],
    "glm4v": [
        {},
        {"size": {"shortest_edge": 1568, "longest_edge": 28**2 * 16}},
        {"images_kwargs": {"size": {"shortest_edge": 1568, "longest_edge": 28**2 * 16}}},
        {},
    ],
}


def counted(processor: Any, options: dict[str, Any]) -> int:
    return int(processor.image_tokens(_Sizes([SIZE]), 0, options))


def made(family: str, alone: Any, options: dict[str, Any]) -> int:
    """How many image tokens the processor of transformers puts into a prompt."""
    own = {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}
    image = "<IMG_CONTEXT>" if family == "internvl" else "<|image|>"
    ids = alone(text=image, images=Image.new("RGB", SIZE), **own)["input_ids"]
    return [*map(int, ids[0])].count(int(alone.image_token_id))


@pytest.mark.parametrize("family", OPTIONS)
def test_options_count_for_their_own_request_alone(family: str, tmp_path: Path) -> None:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    plugin.register()
    directory = build_family_model(family, tmp_path / family)
    processor = MULTIMODAL_REGISTRY.create_processor(ModelConfig(model=str(directory)))
    alone = processor_of(directory)
    tokens = [made(family, alone, options) for options in OPTIONS[family]]
    assert [counted(processor, options) for options in OPTIONS[family]] == tokens
    assert len(set(tokens)) > 1
    assert [made(family, alone, options) for options in OPTIONS[family]] == tokens


def test_the_processor_of_another_glm_may_have_larger_steps() -> None:
    """vLLM serves GLMGA with the class of GLM-4.1V."""
    from transformers import GlmgaImageProcessor

    from promprune_vllm.engine.families.glm4v import PrunedGlm4vProcessor

    images = GlmgaImageProcessor(patch_expand_factor=3)
    processor = object.__new__(PrunedGlm4vProcessor)
    processor.info = SimpleNamespace(
        get_image_processor=lambda: images, ctx=SimpleNamespace(get_merged_mm_kwargs=dict)
    )
    (grid,) = images(Image.new("RGB", SIZE), return_tensors="pt")["image_grid_thw"].tolist()
    assert processor.token_grid(*SIZE, {}) == (grid[1] // 2, grid[2] // 2) == (33, 21)
