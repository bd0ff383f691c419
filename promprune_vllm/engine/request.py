"""``visual_token_budget`` of a request: read, checked, and the only thing let through.

The two front doors of every OpenAI-style route are wrapped to read the field, and the step that puts a request's
extras on its prompts to check it and add it. vLLM's own gate against client-sent processor options
runs in between and stays shut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import FIELD
from promprune_vllm.engine import checks, families, minors
from promprune_vllm.engine.asked import Asked, from_request
from promprune_vllm.engine.plan import SUMMARY
from promprune_vllm.engine.wrapping import wrap
from promprune_vllm.errors import BudgetError
from promprune_vllm.metrics.recorder import expose, recorder
from promprune_vllm.server.told import tell

# Below vLLM's logger, so that its format and level apply to ours.
logger = logging.getLogger("vllm.promprune")
_asked: ContextVar[Asked] = ContextVar("visual_tokens_asked", default=Asked())  # noqa: B039  frozen


def install() -> None:
    """Wrap vLLM's request path. Idempotent."""
    checks.require_names(checks.REQUEST_NAMES)
    import vllm.plugins
    from PIL.Image import DecompressionBombError
    from vllm.multimodal.media.connector import MediaConnector
    from vllm.multimodal.media.image import ImageMediaIO
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.online_renderer import OnlineRenderer

    wrap(OnlineRenderer, "preprocess_chat", _reading)
    wrap(OnlineRenderer, "preprocess_cmpl", _reading)
    for owner, name in minors.harmony_doors():
        wrap(owner, name, _refusing_harmony)
    for owner, name in minors.pooling_doors():
        wrap(owner, name, _refusing_smuggled)
    # Where no file may be read, vLLM raises what becomes an HTTP 500.
    wrap(MediaConnector, "_load_file_url", _as_client_error(RuntimeError))
    # Pillow's limit strikes before vLLM's equal one, with an error that becomes an HTTP 500.
    wrap(ImageMediaIO, "load_bytes", _as_client_error(DecompressionBombError))
    wrap(BaseRenderer, "_apply_prompt_extras", _adding)
    wrap(BaseRenderer, "__init__", _announcing)
    # Looked up anew where an API server is built, and nowhere else.
    wrap(vllm.plugins, "load_endpoint_plugins", _with_endpoints)


def _reading(original: Any) -> Any:
    """Wrap a front door: read the fields, hand them on, and tell the client what became of the images."""

    async def preprocess(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        messages = args[0] if args else kwargs.get("messages")
        with refusing(self.model_config.served_model_name):
            minors.refuse_smuggled(request)
            honour_detail = getattr(self.renderer.mm_processor, "honours_detail", False)
            asked = from_request(request, messages, honour_detail=honour_detail)
            token = _asked.set(asked)
            try:
                result = await original(self, request, *args, **kwargs)
            finally:
                _asked.reset(token)
        prompts = result[1] if isinstance(result, tuple) else result
        for prompt in prompts:
            if SUMMARY in prompt:
                images = prompt[SUMMARY].images
                counts = [(image.seen, image.kept) for image in images]
                tell(counts, prompt["mm_hashes"]["image"], [image.size for image in images])
        return result

    return preprocess


def _as_client_error(error_type: type[Exception]) -> Callable[[Any], Any]:
    """Return a wrapper of a loader of images: what the client asked for is its mistake, and no HTTP 500."""

    def wrapper(original: Any) -> Any:
        def load(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except error_type as error:
                raise ValueError(f"Failed to load image: {error}") from error

        return load

    return wrapper


def _with_endpoints(original: Any) -> Any:
    """Wrap what finds the HTTP server's plugins: ours is found wherever the rest of this plugin is."""

    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        from promprune_vllm.engine.endpoints import Endpoints

        return [*original(*args, **kwargs), Endpoints()]

    return load_endpoint_plugins


def _adding(original: Any) -> Any:
    """Wrap the step that puts a request's extras on its prompts: check what was asked and add it."""

    def apply_prompt_extras(self: Any, prompts: Sequence[Any], prompt_extras: dict[str, Any] | None) -> None:
        from vllm.renderers.inputs.preprocess import extract_target_prompt

        original(self, prompts, prompt_extras)
        for prompt in prompts:
            target: Any = extract_target_prompt(self.model_config, prompt)
            added = _worth_adding(self, _asked.get(), bool(target.get("multi_modal_data")))
            if added:
                target["mm_processor_kwargs"] = {**(target.get("mm_processor_kwargs") or {}), **added}
            # Prompts of an offline LLM arrive here too, with the options their own process trusts.
            with refusing(self.model_config.served_model_name):
                asked = Asked.taken_from(target.get("mm_processor_kwargs") or {})[0]
                admit(self, asked)
                if not target.get("multi_modal_data"):
                    asked.ask().check_images(0)

    return apply_prompt_extras


def _worth_adding(renderer: Any, asked: Asked, has_media: bool) -> dict[str, object]:
    """Return what the processor is to be told: nothing where a request says nothing that matters to it."""
    from promprune_vllm.engine.processor import PrunedProcessorMixin

    listens = isinstance(renderer.mm_processor, PrunedProcessorMixin) and has_media
    if not listens:
        asked = replace(asked, text=None, details=None)
    elif not renderer.mm_processor.reads_text:
        asked = replace(asked, text=None)
    return asked.as_kwargs()


def _refusing_harmony(original: Any) -> Any:
    """Wrap the path of gpt-oss models, which has a renderer of its own and no images at all."""

    def harmony(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        with refusing(self.model_config.served_model_name):
            admit(self.renderer, from_request(request, None, honour_detail=False))
        return original(self, request, *args, **kwargs)

    return harmony


def _refusing_smuggled(original: Any) -> Any:
    """Wrap the way of pooling requests where vLLM has no gate: none of our options may come in by it."""

    def init_context(self: Any, io_processor: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        with refusing(None):
            minors.refuse_smuggled(request)
        return original(self, io_processor, request, *args, **kwargs)

    return init_context


def _announcing(original: Any) -> Any:
    """Wrap the renderer's start: say in one line whether this model can be pruned."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        settings = Settings.from_environment()
        _expose(self, settings)
        if reason := why_not(self):
            logger.warning("PromPrune cannot prune %s: %s. Requests with %s get HTTP 400.", *reason, FIELD)
            for processor in minors.processors(self):
                processor.refusal = reason[1]
        elif settings.budget is None and not settings.detail:
            logger.info("PromPrune prunes the images of requests with %s, method %s.", FIELD, settings.method)
        else:
            kept = settings.budget or "all"
            logger.info("PromPrune keeps %s tokens of an image by default, method %s.", kept, settings.method)

    return init


def _expose(renderer: Any, settings: Settings) -> None:
    """Show our series on this process's ``/metrics`` from the start."""
    import vllm

    from promprune_vllm import __version__
    from promprune_vllm.engine.savings import Savings

    expose(
        renderer.model_config.served_model_name,
        settings.allowed,
        (__version__, vllm.__version__),
        derived=Savings(renderer.config).known,
    )


def admit(renderer: Any, asked: Asked) -> None:
    """Raise ``BudgetError`` unless what was asked can be honoured for this renderer's model."""
    if not asked.explicit:
        return
    asked.ask()
    if reason := why_not(renderer):
        raise BudgetError(
            f"{FIELD} cannot be honoured: {reason[0]} cannot be pruned, {reason[1]}. "
            "Leave the field out, or serve a model that can be.",
            reason="unsupported",
        )


def why_not(renderer: Any) -> tuple[str, str] | None:
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
def refusing(model_name: str | None) -> Iterator[None]:
    """Turn a refused budget into vLLM's HTTP 400, and count it, unless without a name it was no request."""
    try:
        yield
    except BudgetError as error:
        from vllm.exceptions import VLLMValidationError

        if model_name is not None:
            recorder(model_name).refused(error.reason)
        raise VLLMValidationError(str(error), parameter=error.param) from error
