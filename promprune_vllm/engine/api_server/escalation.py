"""Answers again, with more visual tokens, where the first answer's confidence is low.

All of vLLM's routes get their answers from ``AsyncLLM.generate``. It is wrapped: outputs are held back until the
first tokens show how sure the model is. Then either they leave, and all that follows at once; or the first try is
aborted, the prompt is processed with its second budget, and what leaves is that answer alone. If there can be no
second try after all, the first prompt is sent again: an answer that was near is not lost.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from vllm.exceptions import VLLMError

from promprune_vllm.engine.api_server.answer_confidence import Watch, has_failed
from promprune_vllm.engine.api_server.escalation_refusals import refuse
from promprune_vllm.engine.api_server.pruning_plan import Retry, Summary, record_prompt_images
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.api_server.tries import Tries
from promprune_vllm.engine.keys import (
    ASK_AGAIN,
    COUNTED,
    RECORDED,
    REPROCESS,
    REQUEST,
    SUMMARY,
    TRIES,
)

_OURS = (ASK_AGAIN, COUNTED, RECORDED, REPROCESS, SUMMARY, TRIES)
logger = logging.getLogger("vllm.promprune")


def remember_second_try(original: Any) -> Any:
    """Wrap the processing of a prompt: if its answer may be asked for again, attach what processes it then."""

    async def process(self: Any, prompt: Any, **kwargs: Any) -> Any:
        engine_input = await original(self, prompt, **kwargs)
        summary: Summary | None = engine_input.get(SUMMARY)
        if summary is not None and summary.retry is not None:
            options = {**(prompt.get("mm_processor_kwargs") or {}), REQUEST: summary.retry.request}
            again = {**prompt, "mm_processor_kwargs": options}
            engine_input[ASK_AGAIN] = partial(process, self, again, **kwargs)
        return engine_input

    return process


def ask_again_if_unsure(original: Any) -> Any:
    """Wrap the call of the engine: answer a prompt a second time if its first answer's confidence is low."""

    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> Any:
        again = prompt.pop(ASK_AGAIN, None) if isinstance(prompt, dict) else None
        start = partial(original, self, request_id=request_id, **kwargs)
        if again is None:
            return start(prompt, sampling_params)
        retry: Retry = prompt[SUMMARY].retry
        obstacle = _obstacle(sampling_params)
        if obstacle is not None:
            with refusing(self.model_config):
                if retry.sent:
                    refuse(obstacle)
            return start(prompt, sampling_params)
        record_prompt_images(prompt)  # here, because the generator starts after a stream's headers have left
        tries = Tries(self.input_processor, prompt, retry)
        limit = _room(self.model_config.max_model_len, prompt, retry, sampling_params)
        if limit is None:
            tries.no_room()
            return start(prompt, sampling_params)
        second_params = sampling_params.clone()
        second_params.max_tokens = limit
        return _answer(start, partial(_second_prompt, prompt, again), sampling_params, second_params, tries)

    return generate


async def _answer(
    start: Any, second_prompt: Any, sampling_params: Any, second_params: Any, tries: Tries
) -> AsyncIterator[Any]:
    """Yield the outputs of the try that is answered.

    Args:
        start: Starts the engine's generator for a prompt and sampling parameters.
        second_prompt: Makes the prompt of the second try.
        sampling_params: The client's, of the first try.
        second_params: Those of the second try.
        tries: Counts and tells what becomes of the two.
    """
    watch = Watch(tries.retry.escalation, sampling_params)
    try:
        # A copy: if the prompt is sent again, it must be whole.
        async with aclosing(start({**tries.prompt, TRIES: tries}, watch.params)) as outputs:
            async for output in outputs:
                leaving = watch.take(output)
                if watch.unsure:
                    break
                if watch.decided:
                    tries.first_stands(watch)
                    second_prompt = None  # frees the images
                for each in leaving:
                    yield each
        if watch.unsure:
            attempts = [(tries.prompt, sampling_params)]
            if (prompt := await _processed(second_prompt)) is not None:
                attempts.insert(0, (prompt, second_params))
            second_prompt = prompt = None
            async for output in _first_that_starts(start, attempts, tries, watch):
                yield output
    finally:
        tries.ended()


async def _processed(second_prompt: Any) -> dict[str, Any] | None:
    """Return the prompt of the second try, ``None`` if it cannot be processed."""
    try:
        prompt: dict[str, Any] = await second_prompt()
    except Exception as error:
        _log_failure("process", error)
        return None
    return prompt


async def _first_that_starts(
    start: Any, attempts: list[tuple[dict[str, Any], Any]], tries: Tries, watch: Watch
) -> AsyncIterator[Any]:
    """Yield the outputs of the first attempt that the engine answers: the second try, or else the first once more.

    Args:
        start: See ``_answer``.
        attempts: Prompts and sampling parameters; emptied, to free the images.
        tries: Counts and tells what becomes of them.
        watch: Of the first try.
    """
    while attempts:
        prompt, params = attempts.pop(0)
        is_answered = False
        try:
            async with aclosing(start(prompt, params)) as outputs:
                async for output in outputs:
                    if not is_answered and attempts and has_failed(output):
                        _log_failure("answer", None)
                        break
                    if not is_answered:
                        is_answered = True
                        tries.second_starts(prompt, watch)
                        attempts.clear()
                    yield output
        except Exception as error:
            if is_answered or not attempts:
                raise
            _log_failure("admit", error)
        finally:
            tries.second_ended(prompt)


def _log_failure(what: str, error: Exception | None) -> None:
    # Without the text of an error that a client caused, such as an image that is only named: it has a uuid.
    known = error is None or isinstance(error, VLLMError)
    logger.warning(
        "Failed to %s the second try of a prompt (%s). The first is sent again.",
        *(what, type(error).__name__ if error else "an error of the engine"),
        exc_info=None if known else error,
    )


async def _second_prompt(prompt: Mapping[str, Any], again: Any) -> dict[str, Any]:
    """Return a prompt as it is in its second try."""
    processed = await again()
    summary = replace(processed[SUMMARY], form=prompt[SUMMARY].form)
    rest = {key: value for key, value in prompt.items() if key not in _OURS}
    # Its images are recorded in the place of the first try's, once it is answered.
    return {**rest, **processed, SUMMARY: summary, RECORDED: prompt[RECORDED]}


def _obstacle(params: Any) -> str | None:
    """Return why a request with these sampling parameters can have no second try, or ``None``."""
    obstacles = {
        f"the request asks for {params.n} answers (n)": params.n > 1,
        "the request asks for prompt_logprobs": params.prompt_logprobs is not None,
        "the request has logprob_token_ids": getattr(params, "logprob_token_ids", None) is not None,
        "another engine prefills or decodes the prompt": "kv_transfer_params" in (params.extra_args or {}),
    }
    return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)


def _room(longest: int, prompt: Mapping[str, Any], retry: Retry, params: Any) -> int | None:
    """Return ``max_tokens`` of the second try; ``None`` if the longer prompt leaves too little room for it.

    Args:
        longest: Tokens of prompt and answer that the model allows.
        prompt: Of the first try.
        retry: The second try.
        params: The client's sampling parameters.
    """
    first = len(prompt["prompt_token_ids"])
    room = longest - first - retry.more_tokens
    wanted = params.max_tokens
    if wanted is None or wanted >= longest - first:  # all there is: the client sets no limit
        return room if room > 0 else None
    return wanted if wanted <= room else None
