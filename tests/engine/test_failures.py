"""An image that fails in the worker: its requests end with an error, and nothing else happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from promprune_vllm.core.features import VisionFeatures
from promprune_vllm.core.selection import Selection
from tests.engine.conftest import Ask, Engine

pytestmark = pytest.mark.engine
BATCH: tuple[Ask, ...] = (("astronaut", 64), ("coffee", 200), ("rocket", None), ("chelsea", 33))
CULPRIT = 1
Broken = Callable[[VisionFeatures, int], Selection]


def _raise(features: VisionFeatures, keep: int) -> Selection:
    raise torch.OutOfMemoryError("Tried to allocate 1.21 PiB.")


def _too_few(features: VisionFeatures, keep: int) -> Selection:
    return Selection(torch.arange(keep - 1))


class Breaking:
    """The engine's method, broken for one photograph."""

    def __init__(self, method: Any, victim: torch.Tensor, broken: Broken) -> None:
        self.name, self.needs = method.name, method.needs
        self._method, self._victim, self._broken = method, victim, broken

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        is_victim = torch.allclose(features.projected, self._victim, atol=1e-4)
        return (self._broken if is_victim else self._method.select)(features, keep)


@contextmanager
def breaking(engine: Engine, photo: str, broken: Broken = _raise) -> Iterator[None]:
    with torch.inference_mode():
        (victim,) = engine.model.embed_unpruned(pixel_values=engine.pixels(photo))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model, "_method", Breaking(engine.model._method, victim, broken))
        yield


@contextmanager
def capturing(engine: Engine, capture: Callable[..., Any]) -> Iterator[None]:
    """``capture`` gets the original and its arguments."""
    original = engine.model.capture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model, "capture", lambda *arguments: capture(original, *arguments))
        yield


def _prompts(engine: Engine, *asks: Ask) -> list[dict[str, Any]]:
    # Distinct questions after the image: a prefix is shared by requests for the same image and budget alone.
    return [engine.prompt(ask, question=f"{i}. What is in the picture?") for i, ask in enumerate(asks or BATCH)]


def _reason(output: Any) -> str | None:
    return output.outputs[0].finish_reason


def _answer(output: Any) -> list[int]:
    assert _reason(output) == "length"
    return list(output.outputs[0].token_ids)


def _logprobs(output: Any) -> torch.Tensor:
    steps = output.outputs[0].logprobs
    return torch.tensor([[step[token].logprob for token in sorted(step)] for step in steps])


def _failed(output: Any) -> bool:
    """An error, and not one token with it."""
    return _reason(output) == "error" and not output.outputs[0].token_ids and output.finished


def _held(engine: Engine) -> dict[str, Any]:
    """What the caches account for, free of requests."""
    manager = engine.core.scheduler.encoder_cache_manager
    free = manager.num_freeable_slots - manager.num_free_slots
    return {
        "accounts agree": free == sum(manager.freeable.values()) == sum(manager.num_embeds_by_hash.values()),
        "everything is freeable": manager.num_freeable_slots == manager.cache_size,
        "identifiers": set(manager.cached),
        "zeros": [key for key, rows in engine.runner.encoder_cache.items() if not rows.any()],
        "blocks": engine.core.scheduler.kv_cache_manager.usage,
    }


def _assert_clean(engine: Engine) -> None:
    engine.generate([{"prompt": "<s>USER: Hello. ASSISTANT:"}], tokens=1)  # a step that tells the worker
    held = _held(engine)
    assert held["accounts agree"]
    assert held["everything is freeable"]
    assert held["zeros"] == []
    assert held["blocks"] == 0
    assert held["identifiers"] == set(engine.runner.encoder_cache)


def test_the_others_of_a_batch_get_the_answers_they_would_have_got(engine: Engine) -> None:
    engine.forget()
    expected = engine.generate(_prompts(engine))
    engine.forget()
    with breaking(engine, "coffee"):
        outputs = engine.generate(_prompts(engine))
    for i, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if i == CULPRIT:
            assert _failed(output)
        else:
            assert _answer(output) == _answer(wanted)
            assert torch.allclose(_logprobs(output), _logprobs(wanted), atol=1e-5)
    _assert_clean(engine)


@pytest.mark.parametrize("forget", [False, True], ids=["caches as they are", "caches emptied"])
def test_the_same_request_succeeds_once_the_cause_is_gone(engine: Engine, forget: bool) -> None:
    prompts = _prompts(engine)
    engine.forget()
    expected = [_answer(output) for output in engine.generate(prompts)]
    assert len(set(map(tuple, expected))) == len(BATCH), "wrong rows would not show"
    engine.forget()
    with breaking(engine, "coffee"):
        engine.generate(prompts)
    if forget:
        engine.forget()
    (again,) = engine.generate([prompts[CULPRIT]])
    assert _answer(again) == expected[CULPRIT]
    assert len(again.prompt_token_ids) > 7 * 32, "several blocks were there to poison"
    assert again.num_cached_tokens == 0
    assert [_answer(output) for output in engine.generate(prompts)] == expected
    _assert_clean(engine)
