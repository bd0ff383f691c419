"""Positions that run far ahead of the tokens: up to the last row of the rotary table, and never past it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers import rotary_embedding as layers

from promprune_vllm.core.budget import Budget, BudgetRequest
from promprune_vllm.core.policy import BudgetPolicy, MediaPolicy
from promprune_vllm.core.positions import table_rows
from promprune_vllm.demo.processing import IMAGE_ID
from promprune_vllm.engine.api_server.named_images import Size
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.compat import versions
from promprune_vllm.engine.worker import rotary_tables
from promprune_vllm.errors import BudgetError, IncompatibleVllmError
from tests.engine.family_engine import FamilyEngine, picture
from tests.engine.family_facts import FACTS

pytestmark = pytest.mark.engine
LENGTH = 1280
SIDE = 128
"""Tokens of a bar, in every family; it is one token wide."""
# A context as long as the checkpoint's, so that vLLM's own table is as short as it ever is.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    family: (family, {"max_position_embeddings": LENGTH})
    for family, facts in FACTS.items()
    if facts.mrope and not facts.variant
}
# And one that is longer, with YaRN: vLLM's table has 512 rows.
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "rope_theta": 1e6}
_YARN = {**YARN, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
CASES["qwen3_vl with YaRN"] = ("qwen3_vl", {"max_position_embeddings": 512, "rope_parameters": _YARN})


@pytest.fixture(
    scope="module",
    # Per commit, those of the family whose engine such prompts once ended.
    params=[
        pytest.param(name, marks=() if family == "qwen3_vl" else pytest.mark.release)
        for name, (family, _) in CASES.items()
    ],
)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[FamilyEngine]:
    """A prompt comes in chunks of 64 tokens."""
    family, overrides = CASES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        made = FamilyEngine(
            family,
            models[family],
            max_model_len=LENGTH,
            hf_overrides={"text_config": overrides},
            max_num_batched_tokens=64,
            limit_mm_per_prompt={"image": 200},
        )
    yield made
    made.close()


def bar(engine: FamilyEngine, length: int = SIDE, width: int = 1, *, upright: bool = False) -> Image.Image:
    """A strip of so many tokens."""
    config = engine.llm.model_config.hf_config.vision_config
    side = config.patch_size * config.spatial_merge_size
    size = (length * side, width * side)
    return picture("square").resize(size[::-1] if upright else size)


def ask(
    engine: FamilyEngine, images: Sequence[Image.Image], budget: object, *, behind: int = 40
) -> dict[str, Any]:
    """Images with text between them, and as much text behind as a test wants."""
    placeholder = type(engine.model).get_placeholder_str("image", 0)
    prompt = {
        "prompt": "".join(f"{placeholder}{i}. " for i, _ in enumerate(images)) + "x" * behind,
        "multi_modal_data": {"image": list(images)},
    }
    if budget is not None:
        prompt["mm_processor_kwargs"] = {"visual_token_budget": budget}
    return prompt


def kept(prompt: Sequence[int]) -> list[int]:
    """Tokens that each image has in a prompt; a marker stands between any two."""
    return [len(list(run)) for image, run in groupby(prompt, lambda token: token == IMAGE_ID) if image]


def served(engine: FamilyEngine, images: Sequence[Image.Image], budget: object, *, behind: int = 40) -> int:
    """Answer until the context is full, check every position on the way, and return the largest."""
    engine.forget()
    with engine.fed() as fed:
        (output,) = engine.generate([ask(engine, images, budget, behind=behind)], tokens=LENGTH)
    prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
    assert len(prompt) + len(answer) == LENGTH
    assert len(fed.positions) > len(answer) + 1, "the prompt came in chunks"
    visuals = list(zip(images, kept(prompt), strict=True))
    truth = engine.true_positions(prompt, visuals, later=len(answer) - 1)  # the last token is never fed
    assert torch.equal(torch.cat(fed.positions, dim=-1), truth)
    return int(truth.max())


def test_the_tables_have_the_rows_that_requests_are_checked_against(engine: FamilyEngine) -> None:
    """So for every family that there is, and for each one to come."""
    tables = [rope.cos_sin_cache for rope in rotary_tables.tables(engine.model)]
    assert tables
    assert {len(table) for table in tables} == {table_rows(LENGTH)}
    assert engine.processor.info.ctx.model_config.max_model_len == LENGTH


def test_positions_reach_the_last_row_and_the_next_image_is_refused(engine: FamilyEngine) -> None:
    """30 bars that keep 1 token are 3810 positions ahead of the tokens; 3840 are what the table has room for."""
    before = engine.generate([ask(engine, [picture("portrait")], 9)])[0].outputs[0].token_ids
    bars = [bar(engine, upright=i % 2 == 1) for i in range(30)]
    images = [*bars, bar(engine, 31)]
    room = LENGTH - 31 * 3 - sum(len(f"{i}. ") for i in range(31))
    largest = served(engine, images, 1, behind=room - 50)
    assert largest == table_rows(LENGTH) - 2, "the last row is the last token's, which is never fed"
    with pytest.raises(VLLMValidationError, match="could reach 5121, and the limit is 5120") as refused:
        engine.generate([ask(engine, [*images, bar(engine, 2, 2)], 1)])
    assert refused.value.parameter == "visual_token_budget"
    engine.forget()
    assert engine.generate([ask(engine, [picture("portrait")], 9)])[0].outputs[0].token_ids == before


def test_budgets_of_every_form_have_true_positions_until_the_context_is_full(
    engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = [bar(engine, upright=i % 2 == 0) for i in range(12)]
    shapes = [picture(shape) for shape in ("landscape", "tiny")]
    images = [*bars, *shapes]
    full: list[object] = [1] * len(images)
    full[5], full[-1] = "full", 0.5
    for budget, behind in ((0.008, 1080), ({"total": 2 * len(images)}, 1080), (full, 960)):
        assert served(engine, images, budget, behind=behind) > 2 * LENGTH
    monkeypatch.setattr(engine.processor, "_policy", MediaPolicy(BudgetPolicy(Budget(tokens=1))))
    assert served(engine, images, None, behind=1080) > 2 * LENGTH


def test_counting_refuses_what_a_request_would_be_refused_for(engine: FamilyEngine) -> None:
    """The route ``/v1/visual_tokens/count`` knows sizes alone."""
    sizes = [Size(*bar(engine).size)] * 31
    images = SimpleNamespace(get_count=lambda: len(sizes), get_image_size=sizes.__getitem__, sizes=sizes)
    counts = engine.processor.count(images, PruningRequest(BudgetRequest.parse(10), sent=True))
    assert counts == [(SIDE, 10)] * 31
    with pytest.raises(BudgetError, match="limit is 5120"):
        engine.processor.count(images, PruningRequest(BudgetRequest.parse(1), sent=True))


@pytest.mark.skipif(versions.before("0.32"), reason="tables have no factor yet")
@pytest.mark.parametrize("scaling", [{"rope_type": "default", "rope_theta": 1e6}, YARN], ids=["plain", "YaRN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_longer_table_begins_with_vllms_own(scaling: dict[str, Any], dtype: torch.dtype) -> None:
    """vLLM's own factor for more rows would change YaRN's frequencies, and with them every answer."""
    from vllm.config import VllmConfig, set_current_vllm_config

    parameters = {**scaling, "mrope_section": [6, 5, 5]}
    with set_current_vllm_config(VllmConfig()):
        short, long = (
            layers.get_rope(32, 512, rope_parameters=parameters, dtype=dtype, mrope_positions_factor=factor)
            for factor in (1, 4)
        )
    rows = short.cos_sin_cache.clone()
    rotary_tables.lengthen(torch.nn.ModuleList([torch.nn.Identity(), short]), 4096)
    table = short.cos_sin_cache
    assert table.shape == (4096, 32)
    assert torch.equal(table[:512], rows)
    same = torch.equal(table[: len(long.cos_sin_cache)], long.cos_sin_cache)
    assert same == (scaling["rope_type"] == "default")
    frequencies = short._compute_inv_freq(short.scaling_factor or short.base)
    angles = torch.arange(4096, dtype=torch.float64)[:, None] * frequencies.double()
    exact = torch.cat((angles.cos(), angles.sin()), dim=1) * short.mscale
    assert torch.allclose(table.double(), exact, atol=0.01 if dtype == torch.bfloat16 else 1e-3)
    rotary_tables.lengthen(short, 100)
    assert short.cos_sin_cache is table, "long enough"


def test_a_table_that_is_made_otherwise_is_not_lengthened() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        rope = layers.MRotaryEmbedding(32, 32, 100, 1e4, True, torch.float32, [6, 5, 5])
    rope.cos_sin_cache = rope.cos_sin_cache.roll(1, dims=1)
    with pytest.raises(IncompatibleVllmError, match="from 400 rows to 401"):
        rotary_tables.lengthen(rope, 401)
