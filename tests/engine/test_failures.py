"""An image that fails in the worker: its requests end with an error, and nothing else happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from promprune_vllm.core.features import VisionFeatures
from promprune_vllm.core.selection import Selection
from promprune_vllm.engine.worker import fault_isolation
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.metrics.catalog import REQUESTS
from promprune_vllm.metrics.recorder import recorder
from tests.engine.conftest import DEMO, Ask, Engine, held_rows

pytestmark = pytest.mark.engine
TOGETHER = DEMO
BATCH: tuple[Ask, ...] = (("astronaut", 64), ("coffee", 200), ("rocket", None), ("chelsea", 33))
CULPRIT = 1
Broken = Callable[[VisionFeatures, int], Selection]


def _raise(features: VisionFeatures, keep: int) -> Selection:
    raise torch.OutOfMemoryError("Tried to allocate 1.21 PiB.")


def _too_few(features: VisionFeatures, keep: int) -> Selection:
    return Selection(torch.arange(keep - 1))


def _too_few_rows(features: VisionFeatures, keep: int) -> Selection:
    return Selection(torch.arange(keep), rows=features.projected[: keep - 1])


def _out_of_range(features: VisionFeatures, keep: int) -> Selection:
    return Selection(torch.arange(features.tokens - keep + 1, features.tokens + 1))


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
        patch.setattr(engine.model, "_methods", [Breaking(engine.model._methods[0], victim, broken)])
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
        "accounts agree": free == sum(manager.freeable.values()) == held_rows(manager),
        "everything is freeable": manager.num_freeable_slots == manager.cache_size,
        "identifiers": set(manager.cached),
        "zeros": [key for key, rows in engine.rows().items() if not rows.any()],
        "blocks": engine.core.scheduler.kv_cache_manager.usage,
    }


def _assert_clean(engine: Engine) -> None:
    engine.generate([{"prompt": "<s>USER: Hello. ASSISTANT:"}], tokens=1)  # a step that tells the worker
    held = _held(engine)
    assert held["accounts agree"]
    assert held["everything is freeable"]
    assert held["zeros"] == []
    assert held["blocks"] == 0
    assert held["identifiers"] == set(engine.rows())


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


@pytest.mark.parametrize("broken", [_too_few, _too_few_rows, _out_of_range])
def test_a_method_that_breaks_its_contract_fails_the_request(engine: Engine, broken: Broken) -> None:
    engine.forget()
    with breaking(engine, "coffee", broken):
        bad, good = engine.generate([engine.prompt(("coffee", 50)), engine.prompt(("rocket", 50))], tokens=1)
    assert _failed(bad)
    _answer(good)
    _assert_clean(engine)


def test_an_encoder_that_gives_another_token_count_fails_the_request(engine: Engine) -> None:
    def one_token_less(original: Any, *arguments: Any) -> list[EncodedImage]:
        (image,) = original(*arguments)
        fewer = image.groups[0].features.take(torch.arange(23 * 24), (1, 23, 24))
        return [EncodedImage.whole(fewer.projected, fewer)]

    engine.forget()
    with capturing(engine, one_token_less):
        pruned, plain = engine.generate([engine.prompt(("coffee", k)) for k in (50, None)], tokens=1)
        assert _failed(pruned)
        assert _failed(plain), "in a batch with pruned images it is captured as well"
        _answer(*engine.generate([engine.prompt(("coffee", None))], tokens=1))
    _assert_clean(engine)


def test_rows_that_do_not_fill_the_placeholder_fail_the_request(engine: Engine) -> None:
    from promprune_vllm import get_method

    engine.forget()
    with pytest.MonkeyPatch.context() as patch:
        project = engine.model.project
        patch.setattr(engine.model, "_methods", [get_method("visionzip")])
        patch.setattr(engine.model, "project", lambda rows: project(rows)[:-1])
        (output,) = engine.generate([engine.prompt(("coffee", 50))], tokens=1)
    assert _failed(output)
    _assert_clean(engine)


def test_every_request_with_the_image_fails_and_one_without_a_budget_does_not(engine: Engine) -> None:
    engine.forget()
    prompts = _prompts(engine, ("coffee", 64), ("coffee", 64), ("coffee", None), ("rocket", 64))
    expected = [_answer(output) for output in engine.generate(prompts)]
    engine.forget()
    with breaking(engine, "coffee"):
        first, second, unpruned, other = engine.generate(prompts)
    assert _failed(first)
    assert _failed(second)
    assert [_answer(unpruned), _answer(other)] == expected[2:]
    assert [_answer(output) for output in engine.generate(prompts)] == expected
    _assert_clean(engine)


def test_one_of_two_images_of_a_request_fails_it(engine: Engine) -> None:
    engine.forget()
    prompt = engine.prompt(("rocket", 40), ("coffee", 40))
    (expected,) = engine.generate([prompt])
    engine.forget()
    with breaking(engine, "coffee"):
        (output,) = engine.generate([prompt])
    assert _failed(output)
    (again,) = engine.generate([prompt])
    assert _answer(again) == _answer(expected)
    assert 0 < again.num_cached_tokens < 64, "what comes before the failed image was good"
    _assert_clean(engine)


def test_a_capture_that_fails_for_a_batch_fails_its_culprit_alone(engine: Engine) -> None:
    victim = engine.pixels("coffee")
    batches: list[int] = []

    def out_of_memory(original: Any, inputs: Any, items: slice, needs: Any) -> Any:
        pixels = inputs["pixel_values"][items]
        batches.append(len(pixels))
        if any(torch.equal(image, victim[0]) for image in pixels):
            raise torch.OutOfMemoryError("Tried to allocate 1.21 PiB.")
        return original(inputs, items, needs)

    engine.forget()
    expected = engine.generate(_prompts(engine))
    engine.forget()
    with capturing(engine, out_of_memory):
        outputs = engine.generate(_prompts(engine))
    assert batches == [4, 1, 1, 1, 1]
    assert [_failed(output) for output in outputs] == [i == CULPRIT for i in range(4)]
    for i in (0, 2, 3):
        assert _answer(outputs[i]) == _answer(expected[i])
    _assert_clean(engine)


def test_images_that_fail_together_only_are_all_answered(engine: Engine) -> None:
    def one_at_a_time(original: Any, inputs: Any, items: slice, needs: Any) -> Any:
        if items.stop - items.start > 1:
            raise torch.OutOfMemoryError("Tried to allocate 1.21 PiB.")
        return original(inputs, items, needs)

    engine.forget()
    with capturing(engine, one_at_a_time):
        for output in engine.generate(_prompts(engine), tokens=1):
            _answer(output)


def test_a_request_in_chunks_fails_as_a_whole(engine: Engine) -> None:
    scheduler = engine.core.scheduler
    prompt = engine.prompt(("coffee", 200))
    engine.forget()
    expected = _answer(*engine.generate([prompt]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "max_num_scheduled_tokens", 64)
        engine.forget()
        with breaking(engine, "coffee"):
            (output,) = engine.generate([prompt])
        assert _failed(output)
        (again,) = engine.generate([prompt])
    assert _answer(again) == expected
    _assert_clean(engine)


def test_failed_requests_are_counted(engine: Engine) -> None:
    def counted() -> float:
        ours = recorder(engine.llm.llm_engine.vllm_config.model_config.served_model_name)
        return float(ours._at(REQUESTS, "failed")._value.get())

    engine.forget()
    before = counted()
    with breaking(engine, "coffee"):
        engine.generate(_prompts(engine, ("coffee", 64), ("coffee", 64), ("rocket", 64)), tokens=1)
    assert counted() - before == 2


def test_the_log_says_what_happened_and_what_to_do(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.forget()
    with breaking(engine, "coffee"), caplog.at_level("WARNING", logger=fault_isolation.logger.name):
        engine.generate([engine.prompt(("coffee", 64))], tokens=1)
    worker, scheduler = (each for each in caplog.records if each.name == fault_isolation.logger.name)
    assert "Selecting 64 of 576 visual tokens with method 'promprune' failed" in worker.getMessage()
    assert "--gpu-memory-utilization" in worker.getMessage()
    assert worker.exc_info[0] is torch.OutOfMemoryError  # type: ignore[index]
    assert "1 image(s)" in scheduler.getMessage()


def test_outside_a_step_the_exception_passes(engine: Engine) -> None:
    inputs = {"pixel_values": engine.pixels("coffee"), "visual_token_counts": torch.tensor([[576, 64, 0]])}
    with breaking(engine, "coffee"), torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        engine.model.embed_multimodal(**inputs)


def test_a_lost_device_is_no_failure_of_an_image(engine: Engine) -> None:
    """With it, the KV cache of every request is gone: the engine has to end."""

    def lost(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    inputs = {"pixel_values": engine.pixels("coffee"), "visual_token_counts": torch.tensor([[576, 64, 0]])}
    step = fault_isolation._step.set(fault_isolation.Step(1))
    try:
        with capturing(engine, lost), torch.inference_mode(), pytest.raises(torch.AcceleratorError):
            engine.model.embed_multimodal(**inputs)
    finally:
        fault_isolation._step.reset(step)
