"""The feature cache, in every family: what it has is not encoded again, and is the same bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from promprune_vllm.engine.worker import pruned_model
from promprune_vllm.engine.worker.feature_store import FeatureStore
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine, shared_engine
from tests.engine.family_facts import KINDS
from tests.engine.storing import evict, storing
from tests.engine.test_families import ROUNDING, difference, image_rows

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
SHAPES = ("landscape", "portrait")
METHODS = ("divprune", "prunesid", "prumerge", "visionzip", "cdpruner")
"""They look at different features; some merge, in front of the projector or behind it; one reads the text."""


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> FamilyEngine:
    return shared_engine(request.param, models[request.param])


@pytest.fixture
def store(engine: FamilyEngine) -> Iterator[FeatureStore]:
    with storing(engine) as made:
        yield made


def ask(engine: FamilyEngine, *shapes: str, budget: int | None, method: str | None = None) -> dict[str, Any]:
    prompt = engine.ask(*shapes, budget=budget)
    if method is not None:
        prompt["mm_processor_kwargs"]["visual_token_method"] = method
    return prompt


def entered(engine: FamilyEngine, prompt: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """The images' rows with those of DeepStack, and how often the tower was called for them."""
    with engine.fed() as fed:
        (output,) = engine.generate([prompt], tokens=1)
    levels = [torch.cat(fed.deepstack, dim=1)] if fed.deepstack else []
    return torch.cat(
        [image_rows(output, each) for each in (torch.cat(fed.embeds)[None], *levels)]
    ), fed.tower_calls


def test_budgets_and_methods_share_one_encoding(engine: FamilyEngine) -> None:
    """Another budget, other methods, all tokens, and the first budget again after vLLM has lost the images."""
    pruned = [(20, None), (33, None), *((30, method) for method in METHODS)]
    asks = [ask(engine, *SHAPES, budget=budget, method=method) for budget, method in (*pruned, (None, None))]
    expected = []
    for prompt in asks:
        engine.forget()
        expected.append(entered(engine, prompt))
    assert all(calls == expected[0][1] > 0 for _, calls in expected)
    with storing(engine) as store:
        for i, prompt in enumerate([*asks, asks[0]]):
            evict(engine)
            rows, calls = entered(engine, prompt)
            assert torch.equal(rows, expected[i % len(asks)][0])
            assert calls == (0 if i else expected[0][1])
        assert len(store) == len(SHAPES)


def test_an_image_with_all_tokens_is_stored(engine: FamilyEngine, store: FeatureStore) -> None:
    whole, pruned = ask(engine, *SHAPES, budget=None), ask(engine, *SHAPES, budget=20)
    assert [entered(engine, prompt)[1] > 0 for prompt in (whole, pruned)] == [True, False]


def test_a_batch_of_hits_and_misses_equals_one_by_one(engine: FamilyEngine) -> None:
    asks = [
        engine.ask("landscape", budget=9, text="a?"),  # a hit
        engine.ask("portrait", budget=20, text="b?"),
        engine.ask("portrait", text="c?"),  # the same image in the same step
        engine.ask("tiny", "landscape", "square", budget=3, text="d?"),
        engine.ask("square", text="e?"),
    ]
    engine.forget()
    alone = [engine.generate([each])[0] for each in asks]
    with storing(engine) as store:
        engine.generate([engine.ask("landscape", budget=20)], tokens=1)
        evict(engine)
        together = engine.generate(asks)
        assert len(store) == 4
        evict(engine)
        with engine.fed() as fed:
            hot = engine.generate(asks)
        assert fed.tower_calls == 0
    for one, batched, again in zip(alone, together, hot, strict=True):
        assert one.outputs[0].token_ids == batched.outputs[0].token_ids == again.outputs[0].token_ids
        assert difference(one, batched) < ROUNDING
        assert difference(one, again) < ROUNDING


def test_a_failed_image_is_not_kept(
    engine: FamilyEngine, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither if it was stored before: what fails with it may be the stored copy."""
    good, bad = engine.ask("portrait", budget=20), engine.ask("landscape", budget=20)
    expected = [engine.generate([each])[0].outputs[0].token_ids for each in (good, bad)]
    assert len(store) == 2
    victim = engine.tokens("landscape")
    original = pruned_model.select_tokens

    def select(image: Any, keep: int, method: Any) -> Any:
        if len(image.rows) == victim:
            raise RuntimeError("no luck")
        return original(image, keep, method)

    for _ in range(2):  # a hit, then a miss
        evict(engine)
        with monkeypatch.context() as patch:
            patch.setattr(pruned_model, "select_tokens", select)
            outputs = engine.generate([good, bad])
        assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error"]
        assert [total for _, total in store._images] == [engine.tokens("portrait")]
    assert engine.generate([bad])[0].outputs[0].token_ids == expected[1]
    assert len(store) == 2
