"""What is collected of an answer for its audit, and when an audit runs, gives way or fails."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from promprune_vllm.core.audit import MOST_BYTES, MOST_WAITING, Scored
from promprune_vllm.core.load_levels import Load
from promprune_vllm.engine.api_server import audit
from promprune_vllm.engine.api_server import auditor as module
from promprune_vllm.engine.api_server.audit import size_of, unsupported_reason
from promprune_vllm.engine.api_server.auditor import Answered, Auditor
from promprune_vllm.engine.api_server.inspector import Inspector
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan, Summary
from promprune_vllm.engine.api_server.served_answer import ServedAnswer
from promprune_vllm.engine.keys import AUDIT, REPROCESS
from promprune_vllm.engine.keys import SUMMARY as SUMMARY_KEY
from promprune_vllm.errors import SettingsError
from promprune_vllm.metrics import metric

pytestmark = pytest.mark.engine
PROMPT = list(range(600))
SUMMARY = Summary((ImagePlan(576, 64),), (False,), "promprune", None)
WHOLE = Summary((ImagePlan(576, 576),), (False,), "promprune", None)


def place(token: int, rank: int = 1) -> dict[int, Any]:
    from vllm.logprobs import Logprob

    return {token: Logprob(math.log(1 / (token + 2)), rank)}


def output(tokens: list[int], *, reason: str | None = None, flat: bool = False, start: int = 0) -> Any:
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput

    logprobs: Any = FlatLogprobs() if flat else []
    for token in tokens[start:]:
        logprobs.append(place(token, 1 + token % 2))
    answer = CompletionOutput(0, "", tokens[start:], -1.0, logprobs, finish_reason=reason)
    return RequestOutput("r", None, [1], None, [answer], finished=reason is not None)


def answer(kind: str = "DELTA", **asked: Any) -> ServedAnswer:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return ServedAnswer(SamplingParams(output_kind=RequestOutputKind[kind], max_tokens=50, **asked))


OUTPUTS = {
    "DELTA": [output([0]), output([0, 1, 2], start=1), output([0, 1, 2, 3], start=3, reason="stop")],
    "CUMULATIVE": [output([0]), output([0, 1, 2]), output([0, 1, 2, 3], reason="stop")],
    "FINAL_ONLY": [output([0, 1, 2, 3], reason="stop")],
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_each_token_is_collected_once_and_the_client_sees_no_logprobs(kind: str, flat: bool) -> None:
    collected = answer(kind)
    assert collected.params.logprobs == 0
    whole = []
    for each in OUTPUTS[kind]:
        start = 0 if kind != "DELTA" else each.outputs[0].token_ids[0]
        made = output([*range(each.outputs[0].token_ids[-1] + 1)], start=start, flat=flat)
        made.finished, made.outputs[0].finish_reason = each.finished, each.outputs[0].finish_reason
        left = collected.take(made)
        assert (left.outputs[0].logprobs, left.outputs[0].cumulative_logprob) == (None, None)
        whole.append(collected.is_whole)
    assert whole == [False] * (len(whole) - 1) + [True]
    assert collected.tokens == [0, 1, 2, 3]
    assert collected.scores == [Scored(math.log(1 / (token + 2)), token % 2 == 0) for token in range(4)]


@pytest.mark.parametrize("asked", [0, 2])
def test_logprobs_that_the_client_asked_for_leave(asked: int) -> None:
    collected = answer("FINAL_ONLY", logprobs=asked)
    assert collected.params.logprobs == asked
    left = collected.take(output([0, 1], reason="length"))
    assert len(left.outputs[0].logprobs) == 2
    assert collected.is_whole


@pytest.mark.parametrize(
    "last", [output([0, 1], reason="abort"), output([0, 1], reason="error"), output([], reason="stop")]
)
def test_what_failed_or_says_nothing_is_no_whole_answer(last: Any) -> None:
    collected = answer("CUMULATIVE")
    collected.take(last)
    assert not collected.is_whole


def test_logprobs_that_vllm_leaves_out_cost_the_audit_and_not_the_answer() -> None:
    collected, left_out = answer("FINAL_ONLY"), output([0, 1], reason="stop")
    left_out.outputs[0].logprobs = None
    assert collected.take(left_out) is left_out
    assert not collected.is_whole


def test_greedy_is_what_vllm_takes_for_it() -> None:
    from vllm.sampling_params import SamplingType

    for temperature in (0.0, 1e-6, 1e-4, 0.01, 1.0):
        collected = answer(temperature=temperature)
        assert collected.greedy == (collected.params.sampling_type == SamplingType.GREEDY)


def test_the_size_is_that_of_all_images_and_videos() -> None:
    from vllm.multimodal.media import MediaWithBytes

    image, clip = Image.new("RGB", (10, 20)), np.zeros((4, 5, 5, 3), np.uint8)
    media = {"image": [image, MediaWithBytes(image, b"12345")], "video": (clip, {"fps": 2.0})}
    assert size_of(media) == 600 + 605 + 300
    assert size_of(None) == size_of({"image": None}) == 0


def config(**changes: Any) -> Any:
    model = {"logprobs_mode": "raw_logprobs", "is_diffusion": False, "max_model_len": 2048}
    given = {**model, "kv_sharing_fast_prefill": False, "runner_type": "generate", "v2": True, **changes}
    parts = SimpleNamespace(**given, served_model_name="audited", get_vocab_size=lambda: 150_000, policy="fcfs")
    parts.max_num_batched_tokens = 8192
    return SimpleNamespace(
        model_config=parts,
        cache_config=parts,
        scheduler_config=parts,
        parallel_config=SimpleNamespace(_api_process_rank=given.get("rank", 0)),
        use_v2_model_runner=given["v2"],
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logprobs_mode": "processed_logprobs"}, "--logprobs-mode processed_logprobs, not raw_logprobs"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"is_diffusion": True}, "one token after another"),
        ({"runner_type": "pooling"}, "--runner pooling"),
        ({"max_num_queued_reqs": 5}, "a client's place under --max-num-queued-reqs 5"),
        ({"max_num_queued_tokens": 0}, "a client's place under --max-num-queued-tokens 0"),
        ({}, None),
    ],
)
def test_a_server_that_cannot_audit_says_why(changes: dict[str, Any], said: str | None) -> None:
    reason = unsupported_reason(config(**changes))
    assert (reason is None) if said is None else said in str(reason)


def test_a_render_server_does_not_start_with_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    audit.start(None, config())
    monkeypatch.setenv("PROMPRUNE_AUDIT", "1%")
    audit.start(object(), config())
    with pytest.raises(SettingsError, match=r"--visual-token-audit 1% .* a render server has no answers"):
        audit.start(None, config())


@pytest.mark.parametrize(
    ("changes", "logged"),
    [({}, False), ({"v2": False}, True), ({"v2": False, "rank": 1}, False)],
    ids=["V2", "V1", "another API server"],
)
def test_what_memory_limits_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], logged: bool
) -> None:
    audit.start(object(), config(**changes))
    assert not caplog.records
    monkeypatch.setenv("PROMPRUNE_AUDIT", "1%")
    audit.start(object(), config(**changes))
    assert ["at most 894 tokens" in each.message for each in caplog.records] == [True] * logged


@pytest.mark.parametrize("inspects", [False, True])
def test_what_the_inspector_sends_is_never_drawn(monkeypatch: pytest.MonkeyPatch, inspects: bool) -> None:
    monkeypatch.setenv("PROMPRUNE_AUDIT", "100%")

    async def original(renderer: Any, prompt: Any) -> dict[str, Any]:
        return {SUMMARY_KEY: SUMMARY}

    class Chat:
        async def create_chat_completion(self, chat: Any, request: Any) -> Any:
            return await audit.draw_audits(original)(None, chat)

    inspector = Inspector(None, SimpleNamespace(openai_serving_chat=Chat()))
    sent = inspector._send({}, None) if inspects else Chat().create_chat_completion({}, None)  # type: ignore[arg-type]
    assert (AUDIT in asyncio.run(sent)) is not inspects


class Engine:
    """In the place of vLLM's generator, which is asked for one output: what may happen to an audit."""

    def __init__(self, happens: Callable[[], Any] | None = None) -> None:
        self.happens, self.prompts, self.closed = happens, [], 0

    async def __call__(self, prompt: Any, params: Any, request_id: str, **more: Any) -> AsyncIterator[Any]:
        from vllm.outputs import CompletionOutput, RequestOutput

        self.prompts.append((prompt, params, more))
        try:
            if self.happens is not None:
                await self.happens()
            scores = [None, *map(place, prompt["prompt_token_ids"][1:])]
            last = CompletionOutput(0, "", [7], None, None, finish_reason="length")
            yield RequestOutput("r", None, None, scores, [last], finished=True)  # type: ignore[arg-type]
        finally:
            self.closed += 1


async def forever() -> None:
    await asyncio.Event().wait()


def fails(error: Exception) -> Callable[[], Any]:
    async def fail() -> None:
        raise error

    return fail


def refused() -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError("no prompt_logprobs here")


def answered(
    tokens: int = 4,
    length: int = len(PROMPT),
    prompt: list[int] | None = None,
    more: dict[str, Any] | None = None,
) -> Answered:
    collected = answer(temperature=0)
    collected.take(output(list(range(tokens)), reason="stop"))

    async def process(trial: Fraction | None) -> dict[str, Any]:
        assert trial is None, "without a target, nothing is on trial"
        return {"prompt_token_ids": PROMPT if prompt is None else prompt, SUMMARY_KEY: WHOLE, **(more or {})}

    return Answered(process, 10, SUMMARY, length, collected)


class Counted:
    """Stands at what the auditor has counted."""

    def __init__(self, auditor: Auditor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: list[str] = []
        self.found: list[tuple[Any, ...]] = []
        writer = auditor._metrics
        monkeypatch.setattr(writer, "audit", self.results.append)
        monkeypatch.setattr(writer, "audited", lambda *labels, **finding: self.found.append((*labels, finding)))

    async def until(self, number: int) -> list[str]:
        async with asyncio.timeout(60):
            while len(self.results) < number:
                await asyncio.sleep(0.01)
        assert set(self.results) <= set(metric.AUDITS)
        return self.results


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> list[Load]:
    """The engines' load: what the list's last entry says."""
    loads = [Load()]
    monkeypatch.setattr(module, "current_load", lambda: loads[-1])
    return loads


@pytest.mark.usefixtures("load")
def test_an_audit_scores_the_answer_behind_the_whole_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        engine = Engine()
        auditor = Auditor(config(), engine)
        counted = Counted(auditor, monkeypatch)
        assert auditor.hold(10)
        auditor.add(answered())
        assert await counted.until(1) == ["audited"]
        ((prompt, params, more),) = engine.prompts
        assert prompt["prompt_token_ids"] == [*PROMPT, 0, 1, 2, 3]
        assert (params.max_tokens, params.prompt_logprobs, params.detokenize) == (1, 0, False)
        assert more == {"lora_request": None}
        # Every token is first again; those that were not first before, 1 and 3, are as probable as before.
        expected = {"tokens": 4, "agreeing": 4.0, "whole": 1.0, "nats": 0.0}
        assert counted.found == [("promprune", "12.5%", expected)]
        assert auditor._queue.held_bytes == 0

    asyncio.run(run())


@pytest.mark.usefixtures("load")
def test_an_image_that_the_engine_lacks_is_sent_again_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reprocess() -> dict[str, Any]:
        return {"prompt_token_ids": PROMPT, "images": "all"}

    async def run() -> None:
        engine = Engine()

        async def resent(prompt: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            again = await prompt.pop(REPROCESS)()  # as ``resend_on_cache_miss`` does
            async for each in engine({**prompt, **again}, *args, **kwargs):
                yield each

        auditor = Auditor(config(), resent)
        counted = Counted(auditor, monkeypatch)
        auditor.add(answered(more={REPROCESS: reprocess}))
        assert await counted.until(1) == ["audited"]
        ((prompt, *_),) = engine.prompts
        assert prompt["prompt_token_ids"] == [*PROMPT, 0, 1, 2, 3]
        assert prompt["images"] == "all"

    asyncio.run(run())


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize(
    ("happens", "result"),
    [
        (fails(refused()), "refused"),
        (fails(ValueError("secret")), "refused"),
        (fails(RuntimeError("secret")), "failed"),
    ],
)
def test_an_audit_that_fails_is_counted_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, happens: Any, result: str
) -> None:
    async def run() -> None:
        engine = Engine(happens)
        auditor = Auditor(config(), engine)
        counted = Counted(auditor, monkeypatch)
        auditor.add(answered())
        assert await counted.until(1) == [result]
        engine.happens = None
        auditor.add(answered())
        assert await counted.until(2) == [result, "audited"]

    asyncio.run(run())
    assert "secret" not in caplog.text


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize(
    ("case", "settings", "result"),
    [
        (answered(length=2043, prompt=[1] * 2043), {}, "audited"),
        (answered(length=2044, prompt=[1] * 2044), {}, "too_long"),
        (answered(prompt=PROMPT[:-1]), {}, "refused"),
        (answered(prompt=PROMPT), {"v2": False}, "audited"),
        (answered(length=900, prompt=[1] * 900), {"v2": True}, "audited"),
        (answered(length=900, prompt=[1] * 900), {"v2": False}, "too_long"),
    ],
    ids=[
        "it fits",
        "too long",
        "truncated",
        "scored at once",
        "scored in parts",
        "too large to be scored at once",
    ],
)
def test_what_does_not_fit_is_not_sent(
    monkeypatch: pytest.MonkeyPatch, case: Answered, settings: dict[str, Any], result: str
) -> None:
    async def run() -> None:
        engine = Engine()
        auditor = Auditor(config(**settings), engine)
        counted = Counted(auditor, monkeypatch)
        auditor.add(case)
        assert await counted.until(1) == [result]
        assert len(engine.prompts) == (result == "audited")

    asyncio.run(run())


@pytest.mark.parametrize("busy", [Load(0.1, 1), Load(0.5, 0), Load(0.9, 9)])
def test_nothing_runs_while_the_engines_are_not_calm(
    monkeypatch: pytest.MonkeyPatch, load: list[Load], busy: Load
) -> None:
    async def run() -> None:
        engine = Engine()
        auditor = Auditor(config(), engine)
        counted = Counted(auditor, monkeypatch)
        load.append(busy)
        for _ in range(MOST_WAITING + 2):
            assert auditor.hold(10)
            auditor.add(answered())
        await asyncio.sleep(0.3)
        assert (engine.prompts, counted.results) == ([], ["no_space"] * 2)
        assert not auditor.hold(MOST_BYTES - 10 * MOST_WAITING + 1)
        load.append(Load())
        await counted.until(MOST_WAITING + 2)
        assert counted.results[2:] == ["audited"] * MOST_WAITING
        assert auditor.hold(MOST_BYTES)

    asyncio.run(run())


def test_an_audit_ends_when_requests_begin_to_wait(monkeypatch: pytest.MonkeyPatch, load: list[Load]) -> None:
    async def run() -> None:
        engine = Engine(forever)
        auditor = Auditor(config(), engine)
        counted = Counted(auditor, monkeypatch)
        auditor.add(answered())
        while not engine.prompts:
            await asyncio.sleep(0.01)
        load.append(Load(0.1, 1))
        assert await counted.until(1) == ["busy"]
        assert engine.closed == 1

    asyncio.run(run())


def test_nothing_of_an_audit_is_left_when_the_server_stops(
    monkeypatch: pytest.MonkeyPatch, load: list[Load], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(forever)

    async def run() -> None:
        auditor = Auditor(config(), engine)
        Counted(auditor, monkeypatch)
        auditor.add(answered())
        auditor.add(answered())
        while not engine.prompts:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert engine.closed == 1
    assert not caplog.records
