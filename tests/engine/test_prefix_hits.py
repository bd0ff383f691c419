"""Prompts with pruned images that the prefix cache has: as a whole, and up to the middle of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.small_steps import FAMILIES, SMALL_STEPS, SmallSteps, picture_of_its_own, shared_engine

pytestmark = pytest.mark.engine
TOGETHER = SMALL_STEPS
BUDGET, LATER = 50, 5  # tokens of the image, and tokens of an answer that are fed again
PICTURE = picture_of_its_own(5)


@pytest.fixture(params=[*FAMILIES, pytest.param("qwen3_vl", marks=pytest.mark.release)])
def engine(request: pytest.FixtureRequest, demo_model: Path, models: dict[str, Path]) -> SmallSteps:
    return shared_engine(request.param, demo_model, models)


def _block(engine: SmallSteps) -> int:
    return int(engine.core.scheduler.block_size)


def _ask(engine: SmallSteps, over: int, text: str) -> dict[str, Any]:
    """A prompt that fills its blocks of KV cache, but for so many tokens that it has in one more."""
    tokens, _ = engine.rendered(engine.show(PICTURE, budget=BUDGET, text=text))
    missing = (over - len(tokens)) % _block(engine)
    return engine.show(PICTURE, budget=BUDGET, before="x" * missing, text=text)


@pytest.mark.parametrize("lost", [False, True], ids=["rows kept", "rows lost"])
@pytest.mark.parametrize("over", [0, 12], ids=["full blocks", "a block begun"])
@pytest.mark.parametrize("text", ["?", "x" * 40], ids=["up to the image", "behind the image"])
def test_a_prompt_that_is_cached_as_a_whole_answers_the_same(
    engine: SmallSteps, text: str, over: int, lost: bool
) -> None:
    """vLLM computes the last token anew, and with it the rest of its block: part of the image, if that is near."""
    prompt = _ask(engine, over, text)
    tokens, [(start, end)] = engine.rendered(prompt)
    hit = (len(tokens) - 1) // _block(engine) * _block(engine)
    assert len(tokens) % _block(engine) == over
    assert start < hit < end if text == "?" else end <= hit
    truth = engine.true_positions(tokens, [(PICTURE, BUDGET)], LATER)
    engine.forget()
    with engine.fed() as cold:
        (expected,) = engine.ask_all([prompt])
    if lost:
        engine.core.reset_encoder_cache()
    with engine.fed() as hot:
        (answer,) = engine.ask_all([prompt])
    assert answer == expected
    assert (expected.cached, answer.cached) == (0, hit), "tokens that were kept, as all of vLLM's counts"
    assert (cold.tower_calls, hot.tower_calls) == (1, int(lost and hit < end))
    assert torch.equal(torch.cat(cold.positions, dim=-1), truth)
    assert torch.equal(torch.cat(hot.positions, dim=-1), truth[..., hit:])
    assert torch.equal(torch.cat(hot.embeds), torch.cat(cold.embeds)[hit:])


@pytest.mark.parametrize("lost", [False, True], ids=["rows kept", "rows lost"])
def test_another_question_about_two_images_hits_up_to_the_second(engine: SmallSteps, lost: bool) -> None:
    """The first is covered as a whole, and the second in part; only that one is encoded again, if any."""
    pictures = [PICTURE, picture_of_its_own(6)]
    first, second = (
        engine.show(*pictures, budget=BUDGET, before="x" * 3, text=text) for text in ("What?", "Why?")
    )
    expected = engine.alone(second)
    engine.forget()
    (other,) = engine.ask_all([first])
    assert other != expected
    if lost:
        engine.core.reset_encoder_cache()
    tokens, [_, (start, end)] = engine.rendered(second)
    truth = engine.true_positions(tokens, [(picture, BUDGET) for picture in pictures], LATER)
    with engine.fed() as fed:
        (answer,) = engine.ask_all([second])
    assert start < answer.cached < end
    assert answer == expected
    assert fed.tower_calls == int(lost)
    assert torch.equal(torch.cat(fed.positions, dim=-1), truth[..., answer.cached :])
    assert len(engine.rows()) == (1 if lost else 2)
