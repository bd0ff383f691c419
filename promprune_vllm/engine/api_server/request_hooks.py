"""Wrappers that read a request's ``visual_token_budget``, validate it once, and pass it to the processor.

Over HTTP, ``http_fields`` has already read the fields from the body. The entry points of chat, completion and
pooling requests are wrapped to gather the rest: the user's text and OpenAI's ``detail``. The one step that every
prompt passes on its way to the multimodal processor is wrapped to check the fields and attach them to the prompt.
vLLM's own check, which refuses processor options sent by clients, runs in between and stays on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import replace
from typing import Any

from PIL.Image import DecompressionBombError

from promprune_vllm.config import FLAG, PREFIX, Settings
from promprune_vllm.core.budget import FIELD
from promprune_vllm.engine.api_server import audit, escalation_refusals
from promprune_vllm.engine.api_server.admission import admit, unsupported_reason
from promprune_vllm.engine.api_server.pruning_plan import record_prompt_images
from promprune_vllm.engine.api_server.pruning_request import PruningRequest, admitted_request
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.api_server.request_fields import PruningFields, from_request
from promprune_vllm.engine.compat import feature_cache, older_minors
from promprune_vllm.engine.keys import OPTION_PREFIXES, REQUEST
from promprune_vllm.errors import SettingsError

# A child of vLLM's logger, so that vLLM's format and level apply.
logger = logging.getLogger("vllm.promprune")
_fields: ContextVar[PruningFields | None] = ContextVar("visual_token_fields", default=None)


def read_request(original: Any) -> Any:
    """Wrap an entry point: gather the request's fields, and record its images for the reply."""

    async def preprocess(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        messages = args[0] if args else kwargs.get("messages")
        beams = "beam search answers once" if getattr(request, "use_beam_search", False) else None
        token = _fields.set(_gather_fields(self, request, messages, answers_once=beams))
        try:
            result = await original(self, request, *args, **kwargs)
        finally:
            _fields.reset(token)
        for prompt in result[1] if isinstance(result, tuple) else result:
            record_prompt_images(prompt)
        return result

    return preprocess


def read_pooling_request(original: Any) -> Any:
    """Wrap the entry point of pooling requests: gather the request's fields."""

    async def init_context(self: Any, io_processor: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        # No reset: each pooling request runs in its own task.
        messages = getattr(request, "messages", None)
        _fields.set(_gather_fields(self, request, messages, answers_once="the request asks for no answer"))
        return await original(self, io_processor, request, *args, **kwargs)

    return init_context


def _gather_fields(
    serving: Any, request: Any, messages: object, *, answers_once: str | None = None
) -> PruningFields:
    with refusing(serving.model_config):
        older_minors.refuse_our_options(request)
        honor_detail = getattr(serving.renderer.mm_processor, "honors_detail", False)
        fields = from_request(request, messages, honor_detail=honor_detail)
        if answers_once and PruningRequest.parse(fields).asks_again:
            escalation_refusals.refuse(answers_once)
        return fields


def _as_client_error(error_type: type[Exception]) -> Callable[[Any], Any]:
    """Return a wrapper for an image loader that makes an error a ``ValueError``, so vLLM answers HTTP 400."""
    # It inherits from both types, so code that catches the original type still works.
    client_error: Any = type(f"Client{error_type.__name__}", (ValueError, error_type), {})

    def wrapper(original: Any) -> Any:
        def load(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except error_type as error:
                raise client_error(f"Failed to load image: {error}") from error

        return load

    return wrapper


convert_file_errors = _as_client_error(RuntimeError)
"""Wrap the file loader: if local files are not allowed, vLLM raises ``RuntimeError``, which becomes HTTP 500."""
convert_bomb_errors = _as_client_error(DecompressionBombError)
"""Wrap the image loader: Pillow's pixel limit applies before vLLM's equal one, and its error becomes HTTP 500."""


def attach_request(original: Any) -> Any:
    """Wrap the step, plain or async, that processes a prompt: validate the fields and attach them to the prompt.

    The budget of an offline program is parsed here. That of an HTTP request was parsed when its body was read.
    """

    def process(self: Any, prompt: Any, **kwargs: Any) -> Any:
        # Some routes do not call any wrapped entry point.
        fields = _fields.get() or from_request(None, None, honor_detail=False)
        has_media = bool(prompt.get("multi_modal_data"))
        fields = _drop_unused(self, fields, has_media)
        options = {**(prompt.get("mm_processor_kwargs") or {}), **fields.as_kwargs()}
        admitted = admitted_request()
        if admitted is not None and not isinstance(options.get(REQUEST), PruningRequest):  # a second try has one
            options[REQUEST] = replace(admitted, text=fields.text, details=fields.details)
        with refusing(self.model_config):
            request, rest = PruningRequest.split_options(options)
            if admitted is None:
                admit(self, request)
            if request.asks_again and not asyncio.iscoroutinefunction(original):
                escalation_refusals.refuse("vllm.LLM answers once, only servers answer again")
            if not has_media:
                request.budget.check_media([])
        if has_media and _has_our_processor(self) and request != PruningRequest():
            # A copy: an offline program may reuse its own object with another budget.
            prompt = {**prompt, "mm_processor_kwargs": {**rest, REQUEST: request}}
        return original(self, prompt, **kwargs)

    return process


def _drop_unused(renderer: Any, fields: PruningFields, has_media: bool) -> PruningFields:
    """Return the fields without the text and details, if the renderer does not use them."""
    if not (_has_our_processor(renderer) and has_media):
        return replace(fields, text=None, details=None)
    return fields if renderer.mm_processor.reads_text else replace(fields, text=None)


def _has_our_processor(renderer: Any) -> bool:
    from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin

    return isinstance(renderer.mm_processor, PrunedProcessorMixin)


def refuse_harmony(original: Any) -> Any:
    """Wrap the code path of gpt-oss models, which take no images: refuse a budget."""

    def harmony(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        with refusing(self.model_config):
            admit(self.renderer, PruningRequest.parse(from_request(request, None, honor_detail=False)))
        return original(self, request, *args, **kwargs)

    return harmony


def prepare_renderer(original: Any) -> Any:
    """Wrap the renderer's constructor: refuse unusable settings, and tell the processors if they cannot prune."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _propagate_context(self._executor)
        if self.mm_processor is None:  # a text model
            return
        _refuse_engine_options(self.model_config)
        _require_escalation(self.model_config)
        audit.require_audits(self.config)
        reason = unsupported_reason(self)
        if reason is None:
            feature_cache.require_hashes(self.config, Settings.from_environment())
        for processor in older_minors.processors(self) if reason else ():
            processor.unsupported_reason = reason

    return init


def log_pruning_support(renderer: Any) -> None:
    """Log in one line whether a renderer's model can be pruned."""
    settings = Settings.from_environment()
    if settings.escalate is not None:
        again = settings.escalation()
        logger.info(
            "PromPrune answers again with %s tokens if confidence is below %s. vllm.LLM never answers again.",
            *(again.to.printed(), again.below),
        )
    if reason := unsupported_reason(renderer):
        model = renderer.model_config.model
        logger.warning("PromPrune cannot prune %s: %s. Requests with %s get HTTP 400.", model, reason, FIELD)
    elif settings.budget is None and not settings.detail:
        logger.info("PromPrune prunes the images of requests with %s, method %s.", FIELD, settings.method)
    else:
        kept = settings.budget or "all"
        logger.info("PromPrune keeps %s tokens of an image by default, method %s.", kept, settings.method)


def _refuse_engine_options(model_config: Any) -> None:
    """Raise ``SettingsError`` if the engine's processor options contain our fields, which would have no effect."""
    options = getattr(model_config.multimodal_config, "mm_processor_kwargs", None) or {}
    ours = sorted(name for name in options if name.startswith(OPTION_PREFIXES))
    if ours:
        raise SettingsError(
            f"{ours[0]} in the engine's mm_processor_kwargs (--mm-processor-kwargs) has no effect. Set a default "
            f"for all requests with {FLAG}budget or {PREFIX}BUDGET. For one request, send the field with it, or "
            "offline pass mm_processor_kwargs to LLM.chat or LLM.generate."
        )


def _require_escalation(model_config: Any) -> None:
    """Raise ``SettingsError`` if answers are to be asked for again, and cannot be on this server."""
    below = Settings.from_environment().escalate
    if below is not None and (reason := escalation_refusals.unsupported_reason(model_config)):
        raise SettingsError(f"{FLAG}escalate {below} ({PREFIX}ESCALATE) cannot be honored: {reason}.")


def _propagate_context(executor: Any) -> None:
    """Make a renderer's threads, which render pooling requests, run in the context of the request."""
    submit = executor.submit

    def submit_in_context(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(copy_context().run, function, *args, **kwargs)

    executor.submit = submit_in_context
