"""``visual_token_budget`` of a request: read, checked, and the only thing let through.

The two front doors of every OpenAI-style route are wrapped to read the field, and the step that puts a request's
extras on its prompts to check it and add it. vLLM's own gate against client-sent processor options
runs in between and stays shut.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import FIELD, Budget
from promprune_vllm.engine import checks, families
from promprune_vllm.engine.wrapping import wrap
from promprune_vllm.errors import BudgetError
from promprune_vllm.metrics.recorder import expose, recorder

# Below vLLM's logger, so that its format and level apply to ours.
logger = logging.getLogger("vllm.promprune")
SUMMARY = "visual_tokens"
"""Key of a processed prompt: what happened to each image."""
_asked: ContextVar[object] = ContextVar("visual_token_budget", default=None)


def install() -> None:
    """Wrap vLLM's request path. Idempotent."""
    checks.require_names(checks.REQUEST_NAMES)
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.online_renderer import OnlineRenderer

    wrap(OnlineRenderer, "preprocess_chat", _reading)
    wrap(OnlineRenderer, "preprocess_cmpl", _reading)
    wrap(OnlineRenderer, "adjust_harmony_request", _refusing_harmony)
    wrap(BaseRenderer, "_apply_prompt_extras", _adding)
    wrap(BaseRenderer, "__init__", _announcing)


def read(request: Any) -> object:
    """Return what a request asks for, unchecked: its top-level field or the one in ``vllm_xargs``.

    Raises:
        BudgetError: The two contradict each other.
    """
    top = (getattr(request, "model_extra", None) or {}).get(FIELD)
    nested = (getattr(request, "vllm_xargs", None) or {}).get(FIELD)
    if top is not None and nested is not None and top != nested:
        raise BudgetError(f"{FIELD} is {top!r} at the top level and {nested!r} in vllm_xargs: send it once.")
    return nested if top is None else top


def _reading(original: Any) -> Any:
    """Wrap a front door: read the field, hand it on, count what became of the prompts."""

    async def preprocess(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        with refusing():
            token = _asked.set(read(request))
            try:
                result = await original(self, request, *args, **kwargs)
            finally:
                _asked.reset(token)
        if not kwargs.get("skip_mm_cache"):  # set by routes that only look, such as /tokenize
            _count(result[1] if isinstance(result, tuple) else result)
        return result

    return preprocess


def _adding(original: Any) -> Any:
    """Wrap the step that puts a request's extras on its prompts: check the budget and add it."""

    def apply_prompt_extras(self: Any, prompts: Sequence[Any], prompt_extras: dict[str, Any] | None) -> None:
        from vllm.renderers.inputs.preprocess import extract_target_prompt

        original(self, prompts, prompt_extras)
        asked = _asked.get()
        for prompt in prompts:
            target: Any = extract_target_prompt(self.model_config, prompt)
            if asked is not None:
                target["mm_processor_kwargs"] = {**(target.get("mm_processor_kwargs") or {}), FIELD: asked}
            # Prompts of an offline LLM arrive here too, with the options their own process trusts.
            with refusing():
                admit(self, (target.get("mm_processor_kwargs") or {}).get(FIELD))

    return apply_prompt_extras


def _refusing_harmony(original: Any) -> Any:
    """Wrap the path of gpt-oss models, which has a renderer of its own and no images at all."""

    def adjust_harmony_request(self: Any, request: Any) -> Any:
        with refusing():
            admit(self.renderer, read(request))
        return original(self, request)

    return adjust_harmony_request


def _announcing(original: Any) -> Any:
    """Wrap the renderer's start: say in one line whether this model can be pruned."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        expose()
        if reason := _why_not(self):
            logger.warning("PromPrune cannot prune %s: %s. Requests with %s get HTTP 400.", *reason, FIELD)
        else:
            method = Settings.from_environment().method
            logger.info("PromPrune prunes the images of requests with %s, method %s.", FIELD, method)

    return init


def admit(renderer: Any, asked: object) -> None:
    """Raise ``BudgetError`` unless this budget can be honoured for this renderer's model."""
    if asked is None:
        return
    Budget.parse(asked)
    if reason := _why_not(renderer):
        raise BudgetError(
            f"{FIELD} cannot be honoured: {reason[0]} cannot be pruned, {reason[1]}. "
            "Leave the field out, or serve a model that can be."
        )


def _why_not(renderer: Any) -> tuple[str, str] | None:
    """Return (model, reason) where nothing can be pruned."""
    from promprune_vllm.engine.processor import PrunedProcessorMixin

    model = renderer.model_config.model
    if renderer.mm_processor is None:
        return model, "it takes no images"
    reason = families.why_not(renderer.config)
    if reason is None and not isinstance(renderer.mm_processor, PrunedProcessorMixin):
        reason = "the server runs another implementation of it (--model-impl)"
    return (model, reason) if reason else None


@contextmanager
def refusing() -> Iterator[None]:
    """Turn a refused budget into vLLM's HTTP 400, and count it once."""
    try:
        yield
    except BudgetError as error:
        from vllm.exceptions import VLLMValidationError

        recorder().outcome("refused")
        raise VLLMValidationError(str(error), parameter=error.param) from error


def _count(engine_inputs: Sequence[Any]) -> None:
    for engine_input in engine_inputs:
        images = engine_input.get(SUMMARY)
        if images:
            recorder().prompt(sum(image.seen for image in images), sum(image.kept for image in images))
        else:
            recorder().outcome("full" if engine_input["type"] == "multimodal" else "text")
