"""The scheduler's side of a failed image when steps overlap, as they do on an accelerator.

vLLM's asynchronous scheduler plans a step before it has the result of the one before. vLLM turns it off on a CPU,
so here it is driven by hand, without a model.
"""

from __future__ import annotations

import itertools
from copy import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from promprune_vllm.engine import keys
from promprune_vllm.engine.scheduler import failed_images
from promprune_vllm.engine.worker import fault_isolation
from tests.engine.conftest import DEMO, Ask, Engine, held_rows

pytestmark = pytest.mark.engine
TOGETHER = DEMO
IMAGE: Ask = ("coffee", 100)
_names = (f"r{i}" for i in itertools.count())


@dataclass
class Flight:
    """A scheduler of its own, and the results of its steps."""

    engine: Engine
    scheduler: Any
    ended: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def ask(self, *asks: Ask, question: str = "What is it?") -> Any:
        from vllm import SamplingParams

        llm = self.engine.llm.llm_engine
        (rendered,) = llm.renderer.render_cmpl([self.engine.prompt(*asks, question=question)])
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        processed = llm.input_processor.process_inputs(next(_names), rendered, sampling, ("generate",))
        request, _ = self.engine.core.preprocess_add_request(processed)
        self.scheduler.add_request(request)
        return request

    def plan(self) -> Any:
        step = self.scheduler.schedule()
        step.samples = {
            name for name in step.num_scheduled_tokens if not self.scheduler.requests[name].is_prefill_chunk
        }
        return step

    def result(self, step: Any, *failed: str) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(step.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[7] if name in step.samples else [] for name in names],
        )
        if failed:
            setattr(output, keys.FAILED_IMAGES, failed)
        for outputs in self.scheduler.update_from_output(step, output).values():
            for each in outputs.outputs:
                self.tokens.setdefault(each.request_id, []).extend(each.new_token_ids)
                if each.finish_reason is not None:
                    assert each.request_id not in self.ended
                    self.ended[each.request_id] = str(each.finish_reason)

    def failed(self, *requests: Any) -> bool:
        """Whether each ended with an error, without a token that came from zeros."""
        return all(
            self.ended.get(each.request_id) == "error" and not self.tokens[each.request_id] for each in requests
        )

    def assert_nothing_is_left(self, question: str = "What is it?") -> None:
        """A repeat shares nothing, is encoded again, and the accounts are even once it is over."""
        repeat = self.ask(IMAGE, question=question)
        step = self.plan()
        assert step.scheduled_encoder_inputs[repeat.request_id] == [0]
        assert step.num_scheduled_tokens[repeat.request_id] == repeat.num_prompt_tokens
        self.result(step)
        assert self.tokens[repeat.request_id] == [7]
        while self.scheduler.has_unfinished_requests():
            self.result(self.plan())
        manager = self.scheduler.encoder_cache_manager
        assert manager.num_freeable_slots == manager.cache_size
        assert manager.num_free_slots == manager.cache_size - held_rows(manager)
        assert self.scheduler.kv_cache_manager.usage == 0


@pytest.fixture
def flight(engine: Engine) -> Flight:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    real = engine.core.scheduler
    return Flight(
        engine,
        AsyncScheduler(
            vllm_config=engine.core.vllm_config,
            kv_cache_config=real.kv_cache_config,
            structured_output_manager=engine.core.structured_output_manager,
            block_size=real.block_size,
            log_stats=True,
        ),
    )


def _identifier(request: Any) -> str:
    return str(request.mm_features[0].identifier)


def test_requests_planned_before_the_result_fail_as_well(flight: Flight) -> None:
    first, other = flight.ask(IMAGE), flight.ask(("rocket", 50))
    step = flight.plan()
    shares_blocks, shares_rows = flight.ask(IMAGE), flight.ask(IMAGE, ("rocket", 100), question="Which one?")
    following = flight.plan()
    assert following.num_scheduled_tokens[shares_blocks.request_id] < 32, "the rest came from the prefix cache"
    assert shares_rows.request_id not in step.num_scheduled_tokens
    waiting = flight.ask(IMAGE)
    flight.result(step, _identifier(first))
    assert flight.failed(first, shares_blocks, shares_rows)
    flight.result(following)
    assert flight.tokens[other.request_id] == [7, 7]
    assert _identifier(first) in flight.scheduler.schedule().free_encoder_mm_hashes or waiting.num_computed_tokens
    assert flight.failed(first, shares_blocks, shares_rows)
    assert waiting.request_id not in flight.ended
    flight.scheduler.finish_requests([waiting.request_id], _aborted())


def test_nothing_is_left_after_requests_that_shared_blocks(flight: Flight) -> None:
    first = flight.ask(IMAGE)
    step = flight.plan()
    second = flight.ask(IMAGE, question="Another question, which fills a block of its own, and then some more?")
    following = flight.plan()
    flight.result(step, _identifier(first))
    flight.result(following)
    assert flight.failed(first, second)
    flight.assert_nothing_is_left()


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_nothing_is_left_after_requests_that_were_aborted_in_flight(
    flight: Flight, which: tuple[int, ...]
) -> None:
    requests = [flight.ask(IMAGE)]
    step = flight.plan()
    requests.append(flight.ask(IMAGE))
    following = flight.plan()
    flight.scheduler.finish_requests([requests[i].request_id for i in which], _aborted())
    flight.result(step, _identifier(requests[0]))
    flight.result(following)
    assert flight.failed(*(request for i, request in enumerate(requests) if i not in which))
    flight.assert_nothing_is_left()


def test_nothing_is_left_after_a_request_that_was_preempted_in_flight(flight: Flight) -> None:
    request = flight.ask(IMAGE)
    step = flight.plan()
    flight.scheduler.running.remove(request)
    flight.scheduler._preempt_request(request, 0.0)
    flight.result(step, _identifier(request))
    assert flight.failed(request)
    flight.assert_nothing_is_left()


def test_a_request_in_chunks_fails_in_the_middle(flight: Flight) -> None:
    flight.scheduler.max_num_scheduled_tokens = 48
    request = flight.ask(IMAGE)
    step, following = flight.plan(), flight.plan()
    assert request.num_computed_tokens == 96
    flight.result(step, _identifier(request))
    flight.result(following)
    assert flight.failed(request)
    flight.scheduler.max_num_scheduled_tokens = 2048
    flight.assert_nothing_is_left()


def test_a_request_that_has_not_reached_the_image_goes_on(flight: Flight) -> None:
    flight.scheduler.max_num_scheduled_tokens = 190
    first, second = flight.ask(IMAGE), flight.ask(("rocket", 100), IMAGE)
    step = flight.plan()
    assert 0 < second.num_computed_tokens < second.mm_features[1].mm_position.offset
    flight.result(step, _identifier(first))
    assert flight.failed(first)
    assert second.request_id not in flight.ended
    following = flight.plan()
    assert following.scheduled_encoder_inputs[second.request_id] == [1]
    flight.result(following)
    assert flight.tokens[second.request_id] == [7]


def test_the_prefix_cache_of_others_stays(flight: Flight) -> None:
    other = flight.ask(("rocket", 100))
    flight.result(flight.plan())
    for _ in range(3):  # a client that tries again at once
        request = flight.ask(IMAGE)
        flight.result(flight.plan(), _identifier(request))
        assert flight.failed(request)
    again = flight.ask(("rocket", 100))
    step = flight.plan()
    assert step.num_scheduled_tokens[again.request_id] < 32
    assert other.request_id not in flight.ended


def test_the_accounts_are_even_where_a_request_still_refers_to_the_image() -> None:
    """As with a drafter, which looks ahead: the request has been promised the rows, and used none."""
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    manager = EncoderCacheManager(cache_size=100)
    feature = SimpleNamespace(identifier="image")
    request = SimpleNamespace(request_id="r", mm_features=[feature], get_num_encoder_embeds=lambda _: 30)
    assert manager.can_allocate(request, 0, 100, 0)
    manager.allocate(request, 0)
    failed_images._evict_rows(manager, "image", {"r": request})
    assert (manager.num_free_slots, manager.num_freeable_slots) == (100, 100)
    assert manager.get_freed_mm_hashes() == ["image"]
    manager.free(request)
    assert (manager.num_free_slots, manager.num_freeable_slots) == (100, 100)
    failed_images._evict_rows(manager, "image", {"r": request})
    assert (manager.num_free_slots, manager.num_freeable_slots) == (100, 100)


def test_the_second_runner_encodes_anew_what_is_filler() -> None:
    step = fault_isolation.Step(1)
    features = [SimpleNamespace(identifier=name) for name in ("bad", "good")]
    rows = {"bad": step.fill(torch.zeros(3, 4)), "good": torch.ones(3, 4)}
    runner = SimpleNamespace(encoder_cache=SimpleNamespace(encoder_outputs=rows, mm_features={"r": features}))
    prepare = fault_isolation.drop_filler(lambda self, scheduled: sorted(self.encoder_cache.encoder_outputs))
    assert prepare(runner, {"r": [1]}) == ["bad", "good"]
    assert prepare(runner, {"r": [0, 1]}) == ["good"]


def test_a_result_that_arrives_later_is_marked_when_it_does() -> None:
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

    class Later(AsyncModelRunnerOutput):
        def get_output(self) -> Any:
            return EMPTY_MODEL_RUNNER_OUTPUT

        def get_kv_connector_output(self) -> None:
            """Abstract since vLLM 0.33."""

    runner = SimpleNamespace(_promprune_failed_images=("image",))
    output = fault_isolation._add_failed(runner, Later()).get_output()
    assert getattr(output, keys.FAILED_IMAGES) == ("image",)
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, keys.FAILED_IMAGES), "every step would report it"
    assert not hasattr(fault_isolation._add_failed(runner, Later()).get_output(), keys.FAILED_IMAGES)


def test_where_zeros_could_not_be_taken_back_the_exception_passes(engine: Engine) -> None:
    config = engine.runner.vllm_config
    assert fault_isolation.can_contain(config)
    for name, value in (("kv_transfer_config", object()), ("ec_transfer_config", object())):
        other = copy(config)
        object.__setattr__(other, name, value)
        assert not fault_isolation.can_contain(other)
    for name, change in (
        ("parallel_config", {"pipeline_parallel_size": 2, "prefill_context_parallel_size": 1}),
        ("parallel_config", {"pipeline_parallel_size": 1, "prefill_context_parallel_size": 2}),
        ("scheduler_config", {"scheduler_cls": "theirs.Scheduler"}),
        ("model_config", {"runner_type": "pooling"}),
        ("ec_manager_config", {"encoder_cache_manager_cls": "theirs.Manager"}),
    ):
        other = copy(config)
        object.__setattr__(other, name, SimpleNamespace(**change))
        assert not fault_isolation.can_contain(other)


def test_an_image_nobody_can_find_again_is_never_answered() -> None:
    rows = {"a": torch.ones(2, 3)}
    with pytest.raises(RuntimeError, match="1 images failed and 0 of them are in the encoder cache"):
        fault_isolation._identifiers(rows, [torch.zeros(2, 3)])


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED
