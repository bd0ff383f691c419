"""``visual_token_budget`` of a request: read, validated once, and handed to the processor.

Over HTTP, ``http_fields`` has read the fields from the body. The entry points of chats, completions and pooling
requests are wrapped to gather what else matters of a request, its text and OpenAI's ``detail``; and the one step
that every prompt takes on its way to the multimodal processor is wrapped to check the fields and to add them.
vLLM's own gate against client-sent processor options runs in between and stays shut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import replace
from typing import Any

from PIL.Image import DecompressionBombError

from promprune_vllm.config import FLAG, PREFIX, Settings
from promprune_vllm.core.budget import FIELD
from promprune_vllm.engine.api_server.admission import admit, unsupported_reason
from promprune_vllm.engine.api_server.pruning_plan import record_prompt_images
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.api_server.request_fields import PruningFields, from_request
from promprune_vllm.engine.compat import older_minors
from promprune_vllm.engine.keys import OURS, REQUEST
from promprune_vllm.errors import SettingsError

# Below vLLM's logger, so that its format and level apply to ours.
logger = logging.getLogger("vllm.promprune")
_fields: ContextVar[PruningFields | None] = ContextVar("visual_token_fields", default=None)


def read_request(original: Any) -> Any:
    """Wrap an entry point: gather what the request asks for, and record its images for the reply."""

    async def preprocess(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        messages = args[0] if args else kwargs.get("messages")
        token = _fields.set(_gathered(self, request, messages))
        try:
            result = await original(self, request, *args, **kwargs)
        finally:
            _fields.reset(token)
        for prompt in result[1] if isinstance(result, tuple) else result:
            record_prompt_images(prompt)
        return result

    return preprocess


def read_pooling_request(original: Any) -> Any:
    """Wrap the entry point of pooling requests, each of which is a task of its own."""

    async def init_context(self: Any, io_processor: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        _fields.set(_gathered(self, request, getattr(request, "messages", None)))
        return await original(self, io_processor, request, *args, **kwargs)

    return init_context


def _gathered(serving: Any, request: Any, messages: object) -> PruningFields:
    with refusing(serving.model_config):
        older_minors.refuse_smuggled(request)
        honor_detail = getattr(serving.renderer.mm_processor, "honors_detail", False)
        return from_request(request, messages, honor_detail=honor_detail)


def _as_client_error(error_type: type[Exception]) -> Callable[[Any], Any]:
    """Return a wrapper of a loader of images: what the client asked for is its mistake, and no HTTP 500."""
    # Both types: whoever catches the original one still does.
    client_error: Any = type(f"Client{error_type.__name__}", (ValueError, error_type), {})

    def wrapper(original: Any) -> Any:
        def load(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except error_type as error:
                raise client_error(f"Failed to load image: {error}") from error

        return load

    return wrapper


refuse_files = _as_client_error(RuntimeError)
"""Wrap the loader of files: where none may be read, vLLM raises what becomes an HTTP 500."""
refuse_bombs = _as_client_error(DecompressionBombError)
"""Wrap the loader of images: Pillow's limit strikes before vLLM's equal one, with what becomes an HTTP 500."""


def hand_over_request(original: Any) -> Any:
    """Wrap the step, plain or async, that makes an engine's input of a prompt: validate the fields, hand them on.

    An offline program's budget is parsed here; an HTTP request's was parsed when its body was read.
    """

    def process(self: Any, prompt: Any, **kwargs: Any) -> Any:
        # Some routes call none of the wrapped entry points.
        fields = _fields.get() or from_request(None, None, honor_detail=False)
        has_media = bool(prompt.get("multi_modal_data"))
        options = {**(prompt.get("mm_processor_kwargs") or {}), **_useful(self, fields, has_media).as_kwargs()}
        with refusing(self.model_config):
            request, rest = PruningRequest.taken_from(options)
            admit(self, request)
            if not has_media:
                request.budget.check_images(0)
        if has_media and _prunes(self) and request != PruningRequest():
            # A copy: an offline program may send its own object again, with another budget.
            prompt = {**prompt, "mm_processor_kwargs": {**rest, REQUEST: request}}
        return original(self, prompt, **kwargs)

    return process


def _useful(renderer: Any, fields: PruningFields, has_media: bool) -> PruningFields:
    """Return the fields without the text and the details that this renderer has no use for."""
    if not (_prunes(renderer) and has_media):
        return replace(fields, text=None, details=None)
    return fields if renderer.mm_processor.reads_text else replace(fields, text=None)


def _prunes(renderer: Any) -> bool:
    from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin

    return isinstance(renderer.mm_processor, PrunedProcessorMixin)


def refuse_harmony(original: Any) -> Any:
    """Wrap the path of gpt-oss models, which has a renderer of its own and no images at all."""

    def harmony(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        with refusing(self.model_config):
            admit(self.renderer, PruningRequest.parse(from_request(request, None, honor_detail=False)))
        return original(self, request, *args, **kwargs)

    return harmony


def equip_renderer(original: Any) -> Any:
    """Wrap the renderer's start. A text model's renderer, which other programs make too, is not looked into."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _carry_context(self._executor)
        if self.mm_processor is None:
            return
        _refuse_engine_options(self.model_config)
        reason = unsupported_reason(self)
        for processor in older_minors.processors(self) if reason else ():
            processor.refusal = reason

    return init


def announce(renderer: Any) -> None:
    """Say in one line of the log whether a renderer's model can be pruned."""
    settings = Settings.from_environment()
    if reason := unsupported_reason(renderer):
        model = renderer.model_config.model
        logger.warning("PromPrune cannot prune %s: %s. Requests with %s get HTTP 400.", model, reason, FIELD)
    elif settings.budget is None and not settings.detail:
        logger.info("PromPrune prunes the images of requests with %s, method %s.", FIELD, settings.method)
    else:
        kept = settings.budget or "all"
        logger.info("PromPrune keeps %s tokens of an image by default, method %s.", kept, settings.method)


def _refuse_engine_options(model_config: Any) -> None:
    """Raise ``SettingsError`` where our fields are among the engine's processor options, which nobody reads."""
    options = getattr(model_config.multimodal_config, "mm_processor_kwargs", None) or {}
    ours = sorted(name for name in options if name.startswith(OURS))
    if ours:
        raise SettingsError(
            f"{ours[0]} in the engine's mm_processor_kwargs (--mm-processor-kwargs) has no effect. Set a default "
            f"for all requests with {FLAG}budget or {PREFIX}BUDGET. For one request, send the field with it, or "
            "offline pass mm_processor_kwargs to LLM.chat or LLM.generate."
        )


def _carry_context(executor: Any) -> None:
    """Have a renderer's threads run in the context of the request: pooling requests are rendered there."""
    submit = executor.submit

    def submit_in_context(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(copy_context().run, function, *args, **kwargs)

    executor.submit = submit_in_context
