"""Requests that lose what they had: blocks of the KV cache, rows of the encoder cache, between any two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Engine
from tests.engine.storing import evict, storing

pytestmark = pytest.mark.engine
CHUNK = 256
Deeds = dict[int, Callable[[], None]]


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[Engine]:
    made = Engine(demo_model, max_num_batched_tokens=CHUNK, async_scheduling=False)
    yield made
    made.close()


def answer(engine: Engine, prompt: dict[str, Any], after: Deeds | None = None) -> list[int]:
    """Token ids of an answer, with something done after certain steps."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine.llm.llm_engine.add_request(f"{time.monotonic_ns()}", prompt, sampling)
    outputs: list[Any] = []
    for step in range(100):
        outputs += engine.llm.llm_engine.step()
        if after and step in after:
            after[step]()
        if not engine.llm.llm_engine.has_unfinished_requests():
            return list(outputs[-1].outputs[0].token_ids)
    raise AssertionError("It never ends.")


def preempt(engine: Engine) -> None:
    """Do to the request that runs what the scheduler does when it is out of blocks."""
    scheduler = engine.core.scheduler
    (request,) = scheduler.running
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic())


@pytest.mark.parametrize("budget", [64, None])
def test_an_image_that_the_prefix_cache_covered_is_encoded_after_all(engine: Engine, budget: int | None) -> None:
    """Of vLLM alone (0.29 to 0.33) the whole engine dies: the worker was not given the pixels."""
    prompt = engine.prompt(("coffee", budget))
    engine.forget()
    expected = answer(engine, prompt)
    engine.core.reset_encoder_cache()

    def lose_it() -> None:
        preempt(engine)
        assert engine.llm.reset_prefix_cache()

    with engine.watched() as seen:
        assert answer(engine, prompt, {0: lose_it}) == expected
    assert seen.images_per_tower_call == [1]  # not at first: all of its tokens came from the prefix cache


def test_rows_that_are_lost_come_from_the_feature_cache(engine: Engine) -> None:
    prompt = engine.prompt(("rocket", 500))
    engine.forget()
    expected = answer(engine, prompt)
    encoded = []

    def lose_them() -> None:
        encoded.extend(seen.images_per_tower_call)
        preempt(engine)
        evict(engine)

    with storing(engine), engine.watched() as seen:
        assert answer(engine, prompt, {0: lose_them}) == expected
    assert encoded == seen.images_per_tower_call == [1]


@pytest.mark.parametrize("budget", [500, None])
@pytest.mark.parametrize("step", [0, 1])
def test_rows_that_are_evicted_between_two_chunks_are_made_again(
    engine: Engine, budget: int | None, step: int
) -> None:
    prompt = engine.prompt(("rocket", budget))
    engine.forget()
    expected = answer(engine, prompt)
    engine.forget()

    def lose_them() -> None:
        (request,) = engine.core.scheduler.running
        assert 0 < request.num_computed_tokens < request.num_prompt_tokens
        preempt(engine)
        engine.core.reset_encoder_cache()
        engine.llm.reset_prefix_cache()

    with engine.watched() as seen:
        assert answer(engine, prompt, {step: lose_them}) == expected
    assert seen.images_per_tower_call == [1, 1]
