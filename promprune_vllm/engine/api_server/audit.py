"""Draws pruned requests whose answer is audited: scored once more, with all visual tokens, after it has left.

All of vLLM's routes get their answers from ``AsyncLLM.generate``. It is wrapped outermost, so what is audited is
what leaves, also of an answer that was asked for again. The answer is generated as without an audit; only the
log-probabilities of its own tokens are computed too, and taken off again if the client asked for none.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

from promprune_vllm.config import FLAG, PREFIX, Settings
from promprune_vllm.core.budget import Budget, BudgetRequest
from promprune_vllm.core.escalation import EscalationRequest
from promprune_vllm.engine.api_server.auditor import Answered, Auditor, auditor_of, longest_scored
from promprune_vllm.engine.api_server.pruning_plan import Summary
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.served_answer import ServedAnswer
from promprune_vllm.engine.compat import parts, verdict
from promprune_vllm.engine.keys import AUDIT, REQUEST, SUMMARY
from promprune_vllm.errors import SettingsError

_ONCE = EscalationRequest(wanted=False)
_ALL_TOKENS = PruningRequest(BudgetRequest(each=Budget.parse("full")), sent=True, escalate=_ONCE, unpruned=True)

NO_ENGINE = "a render server has no answers"
_inspects: ContextVar[bool] = ContextVar("visual_token_inspects", default=False)

logger = logging.getLogger("vllm.promprune")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A prompt whose answer is to be audited.

    Args:
        process: Processes the prompt with all visual tokens, or with a share of them that is on trial.
        size: Bytes of its images and videos, which ``process`` holds.
    """

    process: Callable[[Fraction | None], Awaitable[dict[str, Any]]]
    size: int


def draw_audits(original: Any) -> Any:
    """Wrap the processing of a prompt: if it is pruned or has a target, draw whether its answer is audited."""
    share, draw = Settings.from_environment().audited_share(), random.Random()

    async def process(self: Any, prompt: Any, **kwargs: Any) -> Any:
        engine_input = await original(self, prompt, **kwargs)
        summary: Summary | None = engine_input.get(SUMMARY)
        if summary is not None and summary.is_audited and not _inspects.get() and draw.random() < share:

            def again(trial: Fraction | None) -> Awaitable[dict[str, Any]]:
                options = prompt.get("mm_processor_kwargs") or {}
                request = _ALL_TOKENS
                if trial is not None:
                    sent, _ = PruningRequest.split_options(options)
                    request = replace(sent, share=trial, escalate=_ONCE)
                changed = {**prompt, "mm_processor_kwargs": {**options, REQUEST: request}}
                processed: Awaitable[dict[str, Any]] = original(self, changed, **kwargs)
                return processed

            engine_input[AUDIT] = Drawn(again, size_of(prompt.get("multi_modal_data")))
        return engine_input

    return process


@contextmanager
def never_drawn() -> Iterator[None]:
    """Draw no audit for the requests that are sent here: they are no traffic."""
    token = _inspects.set(True)
    try:
        yield
    finally:
        _inspects.reset(token)


def audit_answers(original: Any) -> Any:
    """Wrap the call of the engine: have the answer of a drawn prompt audited when it has left."""

    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> Any:
        drawn: Drawn | None = prompt.pop(AUDIT, None) if isinstance(prompt, dict) else None
        auditor = auditor_of(self, partial(original, self))
        start = partial(original, self, prompt, request_id=request_id, **kwargs)
        if drawn is not None and _is_scored_alone(sampling_params):
            answer = ServedAnswer(sampling_params, kwargs.get("lora_request"))
            return _answered(start(answer.params), answer, prompt, drawn, auditor)
        if drawn is not None:
            auditor.count("unsupported")
        return start(sampling_params)

    return generate


async def _answered(
    outputs: Any, answer: ServedAnswer, prompt: Mapping[str, Any], drawn: Drawn, auditor: Auditor
) -> AsyncIterator[Any]:
    """Yield an answer's outputs; then hand what is to be audited to the auditor."""
    held = drawn if auditor.hold(drawn.size) else None
    del drawn  # frees the images if they are too large
    first: Summary = prompt[SUMMARY]
    length = len(prompt["prompt_token_ids"]) + first.total - first.kept
    try:
        async with aclosing(outputs):
            async for output in outputs:
                yield answer.take(output)
    finally:
        summary: Summary = prompt[SUMMARY]  # that of a second try, if it was answered
        if held is None:
            auditor.count("no_space")
        elif answer.is_whole and summary.is_audited:
            auditor.add(Answered(held.process, held.size, summary, length, answer))
        else:
            auditor.release(held.size)
            if not answer.is_whole:
                auditor.count("unanswered")


def _is_scored_alone(params: Any) -> bool:
    """Whether a request has one answer that this engine alone computes."""
    return (
        params.n == 1
        and getattr(params, "logprob_token_ids", None) is None
        and "kv_transfer_params" not in (params.extra_args or {})
    )


def size_of(media: Any) -> int:
    """Return the bytes of images and videos in a prompt, as vLLM has loaded them; 0 for what has no size."""
    if isinstance(media, Mapping):
        return sum(map(size_of, media.values()))
    if isinstance(media, list | tuple):
        return sum(map(size_of, media))
    encoded = getattr(media, "original_bytes", None)
    if encoded is not None:  # an image with the file that it came from
        return len(encoded) + size_of(media.media)
    if hasattr(media, "getbands"):
        width, height = media.size
        return int(width * height * len(media.getbands()))
    return int(getattr(media, "nbytes", 0))


def unsupported_reason(config: Any) -> str | None:
    """Return why a server with this vLLM configuration can audit no answer, or ``None``."""
    # Outputs are read as for a second try, which lists what they must be like.
    if any(map(verdict.current().is_off, (parts.AUDIT, parts.LOAD, parts.ESCALATION))):
        return f"vLLM {verdict.current().version} has changed code that it depends on"
    if config.model_config.runner_type != "generate":
        return f"the server does not generate answers (--runner {config.model_config.runner_type})"
    if config.model_config.logprobs_mode != "raw_logprobs":
        return (
            "answers are scored by log-probabilities, and the server has --logprobs-mode "
            f"{config.model_config.logprobs_mode}, not raw_logprobs"
        )
    if getattr(config.model_config, "is_diffusion", False):
        return "the model does not generate one token after another"
    if config.cache_config.kv_sharing_fast_prefill:
        return "vLLM cannot score a prompt with --kv-sharing-fast-prefill"
    return _limit_of_admission(config.scheduler_config)


def _limit_of_admission(scheduler_config: Any) -> str | None:
    for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
        if (limit := getattr(scheduler_config, name, None)) is not None:
            return f"an audit would take a client's place under --{name.replace('_', '-')} {limit}"
    return None


def require_audits(config: Any) -> None:
    """Raise ``SettingsError`` if answers are to be audited, and cannot be on this server."""
    if Settings.from_environment().audited_share() and (reason := unsupported_reason(config)):
        _refuse(reason)


def start(engine_client: Any, config: Any) -> None:
    """Log how long audited prompts may be, if memory limits them.

    Args:
        engine_client: vLLM's client of its engines; ``None`` on a render server.
        config: vLLM's configuration.

    Raises:
        SettingsError: Answers are to be audited, and this server has no engine.
    """
    if engine_client is None:
        _refuse(f"{NO_ENGINE}. Set it on the server that generates them")
    is_first = getattr(config.parallel_config, "_api_process_rank", 0) <= 0
    if is_first and Settings.from_environment().audited_share() and (most := longest_scored(config)):
        logger.warning(
            "Only answers of at most %d tokens with their prompt are audited: Model Runner V1 scores all tokens "
            "of a step at once, in memory that vLLM does not reserve. With --max-num-batched-tokens %d or less, "
            "and with Model Runner V2, all are.",
            *(most, most),
        )


def _refuse(reason: str) -> None:
    """Raise ``SettingsError`` if answers are to be audited."""
    settings = Settings.from_environment()
    for option, value in {"target": settings.target, "audit": settings.audit}.items():
        if value is not None:
            raise SettingsError(f"{FLAG}{option} {value} ({PREFIX}{option.upper()}) cannot be honored: {reason}.")
