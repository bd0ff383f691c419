"""Every family in real vLLM: where tokens look, what is told of them, what a plan counts without the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.engine.family_engine import FAMILY_ENGINES, SHAPES, FamilyEngine, picture, shared_engine
from tests.engine.family_facts import FAMILIES, KINDS

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> FamilyEngine:
    return shared_engine(request.param, models[request.param])


def test_pictures_differ() -> None:
    assert len({picture(shape).size for shape in SHAPES}) == len(SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_look_where_the_boxes_say(engine: FamilyEngine, shape: str) -> None:
    """A bright block changes the tokens whose boxes hold it more than any other."""
    width, height = SHAPES[shape]
    boxes = engine.boxes(shape)
    dark = Image.new("RGB", (width, height), (20, 20, 20))
    lit = dark.copy()
    block = (0.5 * width, 0, width, 0.5 * height)
    lit.paste((240, 240, 240), tuple(map(round, block)))
    change = (engine.encoded(lit).rows - engine.encoded(dark).rows).norm(dim=1)  # (N,)
    assert len(boxes) == len(change)
    share = torch.tensor([0.0 if box is None else _overlap(box, block) for box in boxes])
    inside, outside = change[share > 0.95], change[share == 0]
    assert len(inside), "no token looks at the block alone"
    assert inside.min() > outside.max()


def test_boxes_cover_the_image(engine: FamilyEngine) -> None:
    for shape, (width, height) in SHAPES.items():
        boxes = [box for box in engine.boxes(shape) if box is not None]
        corners = torch.tensor(boxes)
        assert corners.min(0).values[:2].tolist() == pytest.approx([0, 0], abs=0.01)
        assert corners.max(0).values[2:].tolist() == pytest.approx([width, height], abs=0.01)
        assert (corners[:, 2:] > corners[:, :2]).all()
        area = float(((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).sum())
        least, most = engine.facts.views
        assert 0.98 * least <= area / (width * height) <= 1.02 * most


@pytest.mark.parametrize("engine", KINDS, indirect=True)
@pytest.mark.parametrize("shape", ["landscape", "tiny"])
def test_what_is_told_of_an_image_is_what_entered_the_language_model(engine: FamilyEngine, shape: str) -> None:
    total = engine.tokens(shape)
    for budget in (1, total // 3, total - 1):
        engine.forget()
        engine.generate([engine.ask(shape, budget=budget)], tokens=1)
        (told,) = engine.told()
        _, places = engine.kept(shape, budget)
        kept = sorted([place for part in told["parts"] for place in part["kept"]] + told["newlines"])
        assert kept == places.tolist()
        assert told["seconds"] > 0
        for part in told["parts"]:
            assert set(part["salient"] or ()) <= set(part["kept"])
            assert len(part["salient"] or ()) == part["report"].get("saliency_tokens", 0)
    engine.forget()
    engine.generate([engine.ask(shape)], tokens=1)
    assert engine.told() == [{}]  # every token was kept


def _overlap(box: tuple[float, ...], block: tuple[float, ...]) -> float:
    across = max(0.0, min(box[2], block[2]) - max(box[0], block[0]))
    down = max(0.0, min(box[3], block[3]) - max(box[1], block[1]))
    return across * down / ((box[2] - box[0]) * (box[3] - box[1]))


def test_a_plan_from_the_configuration_has_the_engines_own_numbers(
    engine: FamilyEngine, models: dict[str, Path]
) -> None:
    from promprune_vllm.engine.api_server import prompt_savings
    from promprune_vllm.planning.facts import read

    facts, config = read(str(models[engine.family])), engine.llm.llm_engine.vllm_config
    assert {shape: facts.visual_tokens(*size) for shape, size in SHAPES.items()} == {
        shape: engine.tokens(shape) for shape in SHAPES
    }
    assert facts.decoder == prompt_savings.decoder(config)
    assert facts.kv_bytes_per_token(config.model_config.dtype.itemsize) == prompt_savings.bytes_per_token(config)
    # What the scheduler hands out: a block is one page in each layer with attention.
    from vllm.v1.kv_cache_interface import AttentionSpec

    groups = engine.runner.kv_cache_config.kv_cache_groups
    pages = [
        len(group.layer_names) * group.kv_cache_spec.page_size_bytes
        for group in groups
        if isinstance(group.kv_cache_spec, AttentionSpec)
    ]
    assert sum(pages) == engine.block * prompt_savings.bytes_per_token(config)
    assert engine.block == facts.block_tokens(32, config.model_config.dtype.itemsize)
