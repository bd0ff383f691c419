"""What is held back of a first answer, and what leaves of it when, on outputs as vLLM makes them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from fractions import Fraction
from typing import Any

import pytest

from promprune_vllm.core.budget import Budget
from promprune_vllm.core.escalation import Escalation
from promprune_vllm.engine.api_server import escalation
from promprune_vllm.engine.api_server.answer_confidence import Watch

pytestmark = pytest.mark.engine
FULL = Budget(share=Fraction(1))
OTHER = 1000
"""A token that was not chosen."""


def watch(kind: str, below: float = 0.5, window: int = 4, **asked: Any) -> Watch:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(output_kind=RequestOutputKind[kind], max_tokens=50, stop=["x"], seed=3, **asked)
    return Watch(Escalation(below, FULL, window), params)


def place(token: int, likeliest: float) -> dict[int, Any]:
    from vllm.logprobs import Logprob

    return {token: Logprob(math.log(0.01), 2), OTHER: Logprob(math.log(likeliest), 1)}


def output(likeliest: Sequence[float], start: int = 0, *, reason: str | None = None, flat: bool = False) -> Any:
    """Tokens start, start + 1, ..., of probability 0.01 each, with the probability of the likeliest one there."""
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput

    tokens = list(range(start, start + len(likeliest)))
    logprobs: Any = FlatLogprobs() if flat else []
    for token, probability in zip(tokens, likeliest, strict=True):
        logprobs.append(place(token, probability))
    answer = CompletionOutput(0, "".join(map(str, tokens)), tokens, -1.0, logprobs, finish_reason=reason)
    return RequestOutput("r", None, [1], None, [answer], finished=reason is not None)


def leaving(watched: Watch, outputs: Sequence[Any]) -> list[list[list[int]]]:
    """Token ids of what leaves after each output."""
    return [[list(each.outputs[0].token_ids) for each in watched.take(one)] for one in outputs]


def test_a_stream_is_held_back_until_the_window_is_full_and_leaves_each_token_once_and_in_order() -> None:
    watched = watch("DELTA", window=4)
    outputs = [output([0.9], i) for i in range(6)] + [output([0.9], 6, reason="length")]
    assert leaving(watched, outputs) == [[], [], [], [[0], [1], [2], [3]], [[4]], [[5]], [[6]]]
    assert watched.confidence == pytest.approx(0.9)
    assert watched.tokens == 4


@pytest.mark.parametrize("sizes", [(3, 3, 3), (5, 4), (1, 1, 7), (9,)])
def test_outputs_of_several_tokens_leave_whole(sizes: tuple[int, ...]) -> None:
    watched = watch("DELTA", window=4)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    outputs = [
        output([0.9] * size, start, reason="stop" if start + size == 9 else None)
        for size, start in zip(sizes, starts, strict=True)
    ]
    left = [token for after in leaving(watched, outputs) for each in after for token in each]
    assert left == list(range(9))


def test_an_answer_shorter_than_the_window_is_decided_at_its_end() -> None:
    watched = watch("DELTA", window=16)
    assert leaving(watched, [output([0.9]), output([0.6], 1, reason="stop")]) == [[], [[0], [1]]]
    assert watched.confidence == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["DELTA", "CUMULATIVE", "FINAL_ONLY"])
def test_an_unsure_answer_is_known_at_its_token_and_nothing_of_it_leaves(kind: str) -> None:
    watched = watch(kind)
    outputs = [output([0.9]), output([0.2], 1) if kind == "DELTA" else output([0.9, 0.2])]
    assert leaving(watched, outputs) == [[], []]
    assert watched.unsure
    assert (watched.confidence, watched.tokens) == (pytest.approx(0.2), 2)


@pytest.mark.parametrize("kind", ["DELTA", "CUMULATIVE", "FINAL_ONLY"])
def test_tokens_behind_the_window_decide_nothing(kind: str) -> None:
    watched = watch(kind, window=2)
    delta = kind == "DELTA"
    outputs = [output([0.9]), output([0.9, 0.1], 1) if delta else output([0.9, 0.9, 0.1], reason="stop")]
    assert leaving(watched, outputs)[1]
    assert not watched.unsure
    assert watched.confidence == pytest.approx(0.9)


def test_the_threshold_itself_is_sure() -> None:
    watched = watch("DELTA", below=0.5)
    assert leaving(watched, [output([0.5], reason="stop")]) == [[[0]]]


def test_a_client_who_wants_the_end_alone_gets_the_end_alone() -> None:
    """The first try streams inside the server, so that an unsure one can be aborted."""
    from vllm.sampling_params import RequestOutputKind

    watched = watch("FINAL_ONLY", window=2)
    assert watched.params.output_kind == RequestOutputKind.CUMULATIVE
    outputs = [output([0.9] * n, reason="stop" if n == 4 else None) for n in range(1, 5)]
    assert leaving(watched, outputs) == [[], [], [], [[0, 1, 2, 3]]]


@pytest.mark.parametrize("flat", [False, True])
def test_logprobs_are_those_that_the_client_asked_for(flat: bool) -> None:
    def left(asked: int | None) -> Any:
        watched = watch("DELTA", logprobs=asked)
        assert watched.params.logprobs == (asked or 1)
        (one,) = watched.take(output([0.9, 0.8], reason="stop", flat=flat))
        return one.outputs[0]

    without = left(None)
    assert without.logprobs is without.cumulative_logprob is None
    chosen = left(0)
    assert [list(each) for each in chosen.logprobs] == [[0], [1]]
    assert type(chosen.logprobs) is type(left(1).logprobs)
    assert chosen.cumulative_logprob == -1.0
    assert [list(each) for each in left(1).logprobs] == [[0, OTHER], [1, OTHER]]


def test_what_the_client_set_stays_in_the_first_try() -> None:
    watched = watch("DELTA")
    assert (watched.params.max_tokens, watched.params.stop, watched.params.seed) == (50, ["x"], 3)


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_an_engines_error_is_handed_on(reason: str) -> None:
    watched = watch("DELTA")
    assert leaving(watched, [output([0.9]), output([], 1, reason=reason)]) == [[], [[0], []]]
    assert watched.failed
    assert not watched.unsure


def test_an_answer_without_a_token_is_sure() -> None:
    """The engine is given nothing to be unsure of."""
    watched = watch("FINAL_ONLY", below=1)
    assert leaving(watched, [output([], reason="length")]) == [[[]]]
    assert watched.confidence == 1


class Told:
    """In place of ``Tries``, which needs an engine: what is told of second tries."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []

    def second_starts(self, prompt: Any, _: Watch) -> None:
        self.started.append(prompt["name"])

    def second_ended(self, prompt: Any) -> None:
        self.ended.append(prompt["name"])


def answered(second: Sequence[Any], told: Told) -> list[list[int]]:
    """Token ids that leave: the engine gives these outputs for the second try, or raises, and 7 for the first."""

    async def start(prompt: Any, _: Any) -> AsyncIterator[Any]:
        for each in second if prompt["name"] == "second" else [output([0.9], 7, reason="stop")]:
            if isinstance(each, Exception):
                raise each
            yield each

    async def collect() -> list[list[int]]:
        attempts = [({"name": "second"}, None), ({"name": "first"}, None)]
        outputs = escalation._first_that_starts(start, attempts, told, watch("DELTA"))  # type: ignore[arg-type]
        return [list(each.outputs[0].token_ids) async for each in outputs]

    return asyncio.run(collect())


@pytest.mark.parametrize(
    "second",
    [[RuntimeError("queue is full")], [output([], reason="error")]],
    ids=["it is not admitted", "its image fails"],
)
def test_a_second_try_that_does_not_start_gives_way_to_the_first_prompt(second: list[Any]) -> None:
    told = Told()
    assert answered(second, told) == [[7]]
    assert (told.started, told.ended) == (["first"], ["second", "first"])


def test_a_second_try_that_fails_later_is_the_answer() -> None:
    told = Told()
    assert answered([output([0.9]), output([], 1, reason="error")], told) == [[0], []]
    with pytest.raises(RuntimeError, match="engine is dead"):
        answered([output([0.9]), RuntimeError("engine is dead")], told)
    assert told.started == ["second", "second"]


def test_an_answer_is_decided_before_its_end_leaves() -> None:
    """Then the images that a second try would need are freed."""
    watched = watch("FINAL_ONLY", window=2)
    assert watched.take(output([0.9, 0.9])) == []
    assert watched.decided
    assert not watched.unsure
