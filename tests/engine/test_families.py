"""Every family in real vLLM: counts, rows, positions, saliency, and what shares a batch or a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from promprune_vllm import get_method, methods
from promprune_vllm.demo.families import FAMILIES as DEMO_FAMILIES
from promprune_vllm.demo.families import serving_dtype
from promprune_vllm.demo.processing import IMAGE_ID
from promprune_vllm.engine.compat import versions
from tests.engine import naming, stock
from tests.engine.family_engine import (
    EVERYTHING,
    FAMILY_ENGINES,
    SHAPES,
    FamilyEngine,
    shared_engine,
)
from tests.engine.family_facts import FACTS, FAMILIES, KINDS, OWN_TESTS

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
ROUNDING = 1e-5


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> FamilyEngine:
    return shared_engine(request.param, models[request.param])


# What a variant has of another family, code for code, is tested there.
each_kind = pytest.mark.parametrize("engine", KINDS, indirect=True)
# On V2, the steps of a hybrid take long in Triton's interpreter; with each commit, it has what differs there.
each_quick_kind = pytest.mark.parametrize(
    "engine",
    [pytest.param(k, marks=pytest.mark.release) if serving_dtype(k) == "bfloat16" else k for k in KINDS],
    indirect=True,
)
PICTURES = [*((shape,) for shape in SHAPES), ("landscape", "portrait")]
"""Shapes of the images of a prompt."""
each_prompt = pytest.mark.parametrize("shapes", PICTURES, ids="-".join)


def budgets(engine: FamilyEngine, *shapes: str) -> list[int]:
    """Some budgets for each image, with which the first is pruned."""
    total = engine.tokens(shapes[0])
    return sorted({1, min(7, total), min(33, total), total - 1} - {0})


def image_rows(output: Any, embeds: torch.Tensor) -> torch.Tensor:
    where = [i for i, token in enumerate(output.prompt_token_ids) if token == IMAGE_ID]
    return embeds[..., where, :]


@each_prompt
def test_prompt_tokens_drop_by_exactly_what_is_pruned(engine: FamilyEngine, shapes: tuple[str, ...]) -> None:
    totals = [engine.tokens(shape) for shape in shapes]
    wanted = [None, totals[0], totals[0] + 1, *budgets(engine, *shapes)]
    outputs = engine.generate([engine.ask(*shapes, budget=budget) for budget in wanted], tokens=1)
    lengths = [len(output.prompt_token_ids) for output in outputs]
    kept = [sum(min(budget or total, total) for total in totals) for budget in wanted]
    assert [lengths[0] - length for length in lengths] == [sum(totals) - count for count in kept]


@each_prompt
def test_rows_and_positions_are_the_selected_ones_bit_for_bit(
    engine: FamilyEngine, shapes: tuple[str, ...]
) -> None:
    """DeepStack rows too; positions of prompt and three decode steps against the unpruned prompt's."""
    for budget in (*budgets(engine, *shapes), None):
        engine.forget()
        with engine.fed() as fed:
            (output,) = engine.generate([engine.ask(*shapes, budget=budget, before="Look: ")], tokens=4)
        rows = torch.cat([engine.kept(shape, budget)[0] for shape in shapes])
        width = engine.llm.model_config.get_hidden_size()
        assert torch.equal(image_rows(output, torch.cat(fed.embeds)), rows[:, :width])
        if rows.shape[1] > width:
            levels = image_rows(output, torch.cat(fed.deepstack, dim=1))  # (levels, K, D)
            assert torch.equal(levels.transpose(0, 1).flatten(1), rows[:, width:])
        visuals = [(shape, budget) for shape in shapes]
        truth = engine.true_positions(output.prompt_token_ids, visuals, later=3)
        assert torch.equal(torch.cat(fed.positions, dim=-1), truth)


@each_kind
@pytest.mark.parametrize("chunk", [23, 37, 64])
def test_positions_survive_chunked_prefill_and_prefix_hits(
    engine: FamilyEngine, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three images behind text; then again, with a prefix cached that ends inside an image."""
    shapes = ("landscape", "portrait", "square")
    monkeypatch.setattr(engine.core.scheduler, "max_num_scheduled_tokens", chunk)
    for budget in (None, 1, 20, 40):
        engine.forget()
        ask = engine.ask(*shapes, budget=budget, before="A long text before the image. ")
        visuals = [(shape, budget) for shape in shapes]
        with engine.fed() as fed:
            (cold,) = engine.generate([ask], tokens=4)
        truth = engine.true_positions(cold.prompt_token_ids, visuals, later=3)
        assert torch.equal(torch.cat(fed.positions, dim=-1), truth)
        with engine.fed() as fed:
            (hot,) = engine.generate([ask], tokens=4)
        assert hot.num_cached_tokens > 0
        if budget is None or budget > 1:
            assert (
                hot.prompt_token_ids[hot.num_cached_tokens] == IMAGE_ID
                or hot.num_cached_tokens % engine.block == 0
            )
        assert torch.equal(torch.cat(fed.positions, dim=-1), truth[..., hot.num_cached_tokens :])
        assert hot.outputs[0].token_ids == cold.outputs[0].token_ids


def test_a_prefix_hit_ends_inside_an_image(engine: FamilyEngine) -> None:
    """The second request shares half the image with the first: the other half is encoded and placed anew."""
    engine.forget()
    budget = engine.block + 11  # layers with a state of fixed size make blocks longer
    with engine.fed() as fed:
        engine.generate([engine.ask("landscape", budget=budget, before="x")], tokens=1)
        (again,) = engine.generate([engine.ask("landscape", budget=budget, before="x", text="Other?")], tokens=4)
    assert 0 < again.num_cached_tokens < budget
    truth = engine.true_positions(again.prompt_token_ids, [("landscape", budget)], later=3)
    seen = torch.cat(fed.positions, dim=-1)[..., -(truth.shape[-1] - again.num_cached_tokens) :]
    assert torch.equal(seen, truth[..., again.num_cached_tokens :])


@each_kind
def test_mixed_batches_equal_one_by_one(engine: FamilyEngine) -> None:
    asks = [
        engine.ask("landscape", text="a?"),
        engine.ask("landscape", budget=9, text="b?"),
        engine.ask("portrait", budget=20, text="c?"),
        engine.ask("tiny", "square", budget=3, text="d?"),
        engine.ask(text="No image."),
        engine.ask("square", budget=10_000, text="e?"),
    ]
    engine.forget()
    alone = [engine.generate([ask])[0] for ask in asks]
    engine.forget()
    together = engine.generate(asks)
    hot = engine.generate(asks)
    for one, batched, again in zip(alone, together, hot, strict=True):
        assert one.outputs[0].token_ids == batched.outputs[0].token_ids == again.outputs[0].token_ids
        # A matrix product of another height rounds otherwise, in vLLM without us as well.
        assert difference(one, batched) < ROUNDING
        assert difference(one, again) < ROUNDING


def difference(one: Any, other: Any) -> float:
    """Largest difference between the logprobs of two answers, over the tokens both name."""
    pairs = zip(stock.logprobs(one), stock.logprobs(other), strict=True)
    return max(abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys())


@each_quick_kind
def test_a_preempted_request_answers_as_alone(engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each begins with 7 blocks of 32 tokens and ends with 8; all together have 63.
    asks = [engine.ask("landscape", budget=60 + i, text=f"{i}?".ljust(140, "x")) for i in range(8)]
    engine.forget()
    alone = [engine.generate([ask], tokens=24)[0] for ask in asks]
    engine.forget()
    preempted = []
    original = engine.core.scheduler._preempt_request
    monkeypatch.setattr(
        engine.core.scheduler,
        "_preempt_request",
        lambda request, *args, **kwargs: (
            preempted.append(request.request_id),
            original(request, *args, **kwargs),
        ),
    )
    together = engine.generate(asks, tokens=24)
    assert preempted
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


@each_quick_kind
@pytest.mark.parametrize(
    "name", [name for name, m in methods(over_frames=False).items() if not m.needs & ~EVERYTHING]
)
def test_every_method_the_family_supplies_is_served_exactly(
    engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine.forget()
    monkeypatch.setattr(engine.model, "_methods", [get_method(name)])
    rows, _ = engine.kept("landscape", 30)
    with engine.fed() as fed:
        (output,) = engine.generate([engine.ask("landscape", budget=30)], tokens=1)
    width = engine.llm.model_config.get_hidden_size()
    assert torch.equal(image_rows(output, torch.cat(fed.embeds)), rows[:, :width])


@each_kind
def test_a_failed_image_ends_its_request_alone(engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from promprune_vllm.engine.worker import pruned_model

    good, bad = engine.ask("portrait", budget=20), engine.ask("landscape", budget=20)
    engine.forget()
    expected = [engine.generate([ask])[0].outputs[0].token_ids for ask in (good, bad)]
    engine.forget()
    victim = engine.tokens("landscape")
    original = pruned_model.select_tokens

    def select(image: Any, keep: int, method: Any) -> Any:
        if len(image.rows) == victim:
            raise RuntimeError("no luck")
        return original(image, keep, method)

    with monkeypatch.context() as patch:
        patch.setattr(pruned_model, "select_tokens", select)
        outputs = engine.generate([good, bad])
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error"]
    assert outputs[0].outputs[0].token_ids == expected[0]
    assert engine.generate([bad])[0].outputs[0].token_ids == expected[1]


@each_kind
def test_an_image_that_is_counted_wrong_is_served_as_vllm_counts_it(
    engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an option of the processor that a family does not count; beside a pruned image, in one batch."""
    asks = [engine.ask("landscape"), engine.ask("portrait", budget=20)]
    engine.forget()
    expected = [output.outputs[0].token_ids for output in engine.generate(asks)]
    original = engine.processor.image_tokens

    def one_too_many(images: Any, index: int, options: Any) -> int:
        return int(original(images, index, options)) + (images.get_image_size(index) == SHAPES["landscape"])

    engine.forget()
    monkeypatch.setattr(engine.processor, "image_tokens", one_too_many)
    assert [output.outputs[0].token_ids for output in engine.generate(asks)] == expected


@each_kind
def test_an_encoder_call_has_no_more_tokens_than_were_profiled(
    engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's scheduler counts kept tokens, of which a step may have many images'."""
    totals = [engine.tokens(shape) for shape in SHAPES]
    limit, encoded, original = max(totals) + 1, [], engine.model.capture

    def capture(*arguments: Any) -> Any:
        images = original(*arguments)
        encoded.append(sum(len(image.rows) for image in images))
        return images

    engine.forget()
    monkeypatch.setattr(engine.model, "_encoder_tokens", limit)
    monkeypatch.setattr(engine.model, "capture", capture)
    engine.generate([engine.ask(shape, budget=3) for shape in SHAPES], tokens=1)
    assert sum(encoded) == sum(totals)
    assert max(encoded) <= limit


def test_without_a_budget_or_with_a_large_one_it_is_stock_vllm(
    engine: FamilyEngine, stock_answers: dict[str, Any]
) -> None:
    for shape in SHAPES:
        for budget in (None, engine.tokens(shape), 5000):
            engine.forget()
            (output,) = engine.generate([engine.ask(shape, budget=budget)])
            assert stock.answer(output) == stock_answers[engine.family][shape]


@each_quick_kind
@pytest.mark.parametrize("check", naming.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_an_image_that_is_named_and_not_sent(engine: FamilyEngine, check: Any) -> None:
    check(engine, lambda: engine.ask("landscape"))


@each_quick_kind
def test_of_named_images_none_is_taken_for_another(engine: FamilyEngine) -> None:
    naming.check_another_image_is_never_served(
        engine, lambda: engine.ask("landscape"), lambda: engine.ask("portrait")
    )
    naming.check_some_of_several_are_named(engine, lambda: engine.ask("landscape", "portrait"))


@each_kind
@pytest.mark.skipif(versions.before("0.30"), reason="vLLM 0.29 takes no videos that are named")
def test_a_video_that_is_named_without_a_budget_is_left_to_vllm(engine: FamilyEngine) -> None:
    if "video" not in engine.modalities:
        pytest.skip("the family takes no videos")
    prompt = {
        "prompt": f"{type(engine.model).get_placeholder_str('video', 1)}What?",
        "multi_modal_data": {"video": [None]},
        "multi_modal_uuids": {"video": ["new"]},
    }
    assert naming.refusal(engine, prompt) == naming.VLLM_SAYS.format("video")


def test_every_family_has_a_row_or_tests_of_its_own() -> None:
    assert {*FACTS, *OWN_TESTS} == {*DEMO_FAMILIES}


def test_the_table_says_what_vllm_says(engine: FamilyEngine) -> None:
    """What lists of parameters are made from before there is an engine."""
    assert engine.facts.mrope == engine.mrope
    assert engine.facts.tiled == (len(engine.encoded("landscape").groups) > 1)
