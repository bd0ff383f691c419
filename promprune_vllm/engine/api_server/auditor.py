"""Audits answers one at a time, in the background, only while no request waits for an engine.

An audit is one prefill: the prompt with all visual tokens, and the answer's tokens behind it. vLLM gives the
log-probability and the rank of each token of a prompt. If requests begin to wait, the audit ends, and is counted
as busy. It is not tried again: under steady load, its work would only be thrown away again. With a target, a
second prefill scores the answer behind the prompt with the next smaller share; see ``core.target``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import Context
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from vllm import SamplingParams, exceptions
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from promprune_vllm.config import Settings
from promprune_vllm.core.audit import AuditQueue, Scored, agreement, compare, kept_class
from promprune_vllm.core.load_levels import LoadLimits
from promprune_vllm.engine.api_server.answer_confidence import has_failed
from promprune_vllm.engine.api_server.load_monitor import current_load
from promprune_vllm.engine.api_server.pruning_plan import Summary
from promprune_vllm.engine.api_server.served_answer import ServedAnswer, scored
from promprune_vllm.engine.api_server.target_levels import target_levels
from promprune_vllm.engine.keys import AUDITOR, COUNTED, RECORDED, REPROCESS, SUMMARY
from promprune_vllm.metrics.recorder import recorder

logger = logging.getLogger("vllm.promprune")
_SECONDS_BETWEEN_LOOKS = 0.05
_MOST_SCORE_BYTES = 1 << 30
"""Model Runner V1 scores all tokens of a step at once, in memory that vLLM does not reserve; V2 scores 1,024."""
_IDS = "prompt_token_ids"
_LOWEST_PRIORITY = 1 << 30
_LIMITS = LoadLimits()


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer to audit.

    Args:
        process: Processes its prompt with all visual tokens, or with a share of them that is on trial.
        size: Bytes of the images and videos that ``process`` holds.
        summary: How the answered prompt was pruned.
        length: Tokens of the prompt with all visual tokens.
        answer: Its tokens, and their scores with the kept visual tokens.
    """

    process: Callable[[Fraction | None], Awaitable[dict[str, Any]]]
    size: int
    summary: Summary
    length: int
    answer: ServedAnswer


def auditor_of(engine: Any, generate: Any) -> Auditor:
    """Return the auditor of vLLM's ``AsyncLLM``; ``generate`` is its method without audits."""
    if AUDITOR not in engine.__dict__:
        setattr(engine, AUDITOR, Auditor(engine.vllm_config, generate))
    found: Auditor = engine.__dict__[AUDITOR]
    return found


class Auditor:
    """Audits the answers of one engine client.

    Args:
        config: vLLM's configuration.
        generate: Starts vLLM's generator for a prompt, sampling parameters and a request id.
    """

    def __init__(self, config: Any, generate: Any) -> None:
        self._config, self._generate = config, generate
        name = config.model_config.served_model_name
        self._metrics = recorder(name)
        self._target = target_levels(Settings.from_environment().agreement(), name)
        self._queue: AuditQueue[Answered] = AuditQueue()
        self._task: asyncio.Task[None] | None = None
        self._running: asyncio.Task[str] | None = None

    def count(self, result: str) -> None:
        """Count what became of a drawn request, one of ``AUDITS``."""
        self._metrics.audit(result)

    def hold(self, size: int) -> bool:
        """Reserve the bytes of a prompt's images and videos; see ``AuditQueue``."""
        return self._queue.hold(size)

    def release(self, size: int) -> None:
        """Give them back."""
        self._queue.release(size)

    def add(self, answered: Answered) -> None:
        """Have an answer audited when the engines have time for it; its bytes are reserved."""
        if not self._queue.push(answered):
            self.release(answered.size)
            self.count("no_space")
        elif self._task is None or self._task.done():
            # With a context of its own: nothing of the request belongs to its audit.
            self._task = asyncio.get_running_loop().create_task(self._audit_all(), context=Context())

    async def _audit_all(self) -> None:
        while len(self._queue):
            while _LIMITS.judge(current_load()) != "calm":
                await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
            answered = self._queue.pop()
            assert answered is not None
            try:
                self.count(await self._unless_requests_wait(answered))
            finally:
                self.release(answered.size)
                del answered  # frees the images while the next one waits

    async def _unless_requests_wait(self, answered: Answered) -> str:
        self._running = asyncio.create_task(self._audited(answered))
        try:
            while not self._running.done():
                await asyncio.wait([self._running], timeout=_SECONDS_BETWEEN_LOOKS)
                if current_load().waiting:
                    self._running.cancel()
            return "busy" if self._running.cancelled() else self._running.result()
        finally:
            self._running.cancel()  # if the server stops
            self._running = None

    async def _audited(self, answered: Answered) -> str:
        """Audit one answer, and return what became of it."""
        try:
            return await self._score(answered)
        except (
            exceptions.VLLMValidationError,
            ValueError,
        ):  # such as an image that is only named, and no longer known
            return "refused"
        except EngineDeadError:  # the server stops, or vLLM says why its engine has ended
            return "failed"
        except Exception as error:
            # Without the error's text, which could quote the request.
            trace = "".join(traceback.format_tb(error.__traceback__))
            logger.warning("The audit of an answer failed (%s).\n%s", type(error).__name__, trace)
            return "failed"

    async def _score(self, answered: Answered) -> str:
        answer, summary = answered.answer, answered.summary
        if not self._fits(answered.length + len(answer.tokens)):
            return "too_long"
        audited = answer.scores
        if summary.kept < summary.total:
            audited = await self._scores(answered, None)
            finding = compare(answer.scores, audited, greedy=answer.greedy)
            kept = kept_class(summary.kept, summary.total)
            self._metrics.audited(summary.method, kept, **asdict(finding))
            if summary.targeted and self._target:
                self._target.observe(summary.targeted, finding.whole)
        if self._target and (trial := self._target.trial(summary.targeted)):
            tried = await self._scores(answered, trial.share)
            self._target.try_out(trial, agreement(answer.scores, audited, tried, greedy=answer.greedy))
        return "audited"

    async def _scores(self, answered: Answered, trial: Fraction | None) -> list[Scored]:
        """Return the scores of an answer behind its prompt with other visual tokens."""
        prompt = await answered.process(trial)
        summary: Summary = prompt[SUMMARY]
        if len(prompt[_IDS]) != answered.length + summary.kept - summary.total:
            raise ValueError("the prompt is truncated")
        answer = answered.answer.tokens
        whole = _with_answer(prompt, answer)
        output = await self._last_output(whole, answered.answer.lora)
        if output is None or has_failed(output):
            raise RuntimeError("the engine did not score the answer")
        self._metrics.audit_tokens(len(whole[_IDS]))
        places = output.prompt_logprobs[-len(answer) :]
        return [scored(place[token]) for place, token in zip(places, answer, strict=True)]

    async def _last_output(self, prompt: dict[str, Any], lora: Any) -> Any:
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        more = {"priority": _LOWEST_PRIORITY} if self._config.scheduler_config.policy == "priority" else {}
        prompt |= {COUNTED: True, RECORDED: 0}  # it is no request of a client
        last = None
        request_id = f"promprune-audit-{uuid.uuid4().hex}"
        async with aclosing(self._generate(prompt, params, request_id, lora_request=lora, **more)) as outputs:
            async for output in outputs:
                last = output
        return last

    def _fits(self, tokens: int) -> bool:
        """Whether the model takes so many tokens and one more, and has the memory to score them."""
        at_most = min(self._config.model_config.max_model_len - 1, longest_scored(self._config) or math.inf)
        return bool(tokens <= at_most)


def longest_scored(config: Any) -> int | None:
    """Return how many tokens a prompt with its answer may have, if memory limits how many can be scored.

    Args:
        config: vLLM's configuration.
    """
    step = config.scheduler_config.max_num_batched_tokens
    # Logits and log-probabilities of one step, in float32.
    most = _MOST_SCORE_BYTES // (config.model_config.get_vocab_size() * 8)
    return None if config.use_v2_model_runner or step <= most else most


def _with_answer(prompt: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """Return a prompt with an answer's tokens behind it, also if it is processed again for lack of its images."""
    reprocess = prompt.get(REPROCESS)
    whole = {**prompt, _IDS: [*prompt[_IDS], *tokens]}
    if reprocess is not None:

        async def again() -> dict[str, Any]:
            return _with_answer(await reprocess(), tokens)

        whole[REPROCESS] = again
    return whole
