"""Adapters for older vLLM minors. All other code is written against the newest minor.

An adapter gives an older minor the hook that the newest has, with the newest's own defaults. So ``processor.py``
only knows the newest vLLM, and dropping a minor means deleting its lines here and its seams. On the
newest minor, nothing in this file changes anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.engine.compat import versions
from promprune_vllm.engine.keys import OPTION_PREFIXES
from promprune_vllm.errors import BudgetError

_inputs: ContextVar[Any] = ContextVar("promprune_processor_inputs", default=None)


def add_mm_hashes(_: None) -> Any:
    """Return the method of vLLM 0.32 that makes cache keys."""
    return _get_mm_hashes


def add_missing_kwargs(_: None) -> Any:
    """Return the method of vLLM 0.32 that gives the processor options for images missing from the cache."""
    return _get_cache_missing_processor_kwargs


def add_dummy_inputs(_: None) -> Any:
    """Return the method of vLLM 0.31 that makes the inputs of the profiling run."""
    return _get_dummy_inputs


def _get_mm_hashes(self: Any, inputs: Any) -> Any:
    """Return the cache keys, as vLLM 0.32 does."""
    return inputs.get_mm_hashes(self.info.model_id, self.info.ctx.get_mm_config().mm_hasher_algorithm)


def _get_cache_missing_processor_kwargs(self: Any, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:  # noqa: ARG001
    """Return the processor options, as vLLM 0.32 does."""
    options: Mapping[str, object] = inputs.hf_processor_mm_kwargs
    return options


def use_processor_hashes(original: Any) -> Any:
    """Wrap the processing of a prompt: the processor makes the images' cache keys, as in 0.32."""

    def cached_apply_hf_processor(self: Any, inputs: Any, timing_ctx: Any) -> Any:
        copied = replace(inputs)
        copied.get_mm_hashes = lambda *_, **__: self._get_mm_hashes(inputs)
        token = _inputs.set(copied)
        try:
            return original(self, copied, timing_ctx)
        finally:
            _inputs.reset(token)

    return cached_apply_hf_processor


def use_processor_options(original: Any) -> Any:
    """Wrap the cache look-up: afterwards the options apply only to the images missing from the cache.

    vLLM reads the options from ``inputs`` only after this call, and ``inputs`` is this prompt's own copy.
    """

    def get_cache_missing_items(self: Any, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        mm_is_cached, missing = original(self, cache, mm_data_items, mm_hashes)
        inputs = _inputs.get()
        if inputs is not None:  # None: a vLLM model with its own code path, which has no hooks
            inputs.hf_processor_mm_kwargs = self._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        return mm_is_cached, missing

    return get_cache_missing_items


def _get_dummy_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the inputs of the profiling run: in 0.30 the dummy inputs builder makes them."""
    return type(self.dummy_inputs).get_dummy_processor_inputs(self.dummy_inputs, *args, **kwargs)


def redirect_dummy_inputs(original: Any) -> Any:
    """Wrap the constructor of a processor: the processor makes the profiling run's inputs, as in 0.31."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.dummy_inputs.get_dummy_processor_inputs = self.get_dummy_inputs

    return init


def processors(renderer: Any) -> Iterable[Any]:
    """Return every processor of a renderer: before 0.31, the tokenize endpoint has its own."""
    candidates = [renderer.mm_processor]
    if versions.before("0.31"):
        candidates.append(renderer._readonly_mm_processor)
    return [processor for processor in candidates if processor is not None]


def processor_cache(processor: Any, inputs: Any) -> Any:
    """Return the cache used for a prompt, or ``None``. Before 0.31, the processor has it."""
    return processor.cache if versions.before("0.31") else inputs.cache


def refuse_our_options(request: Any) -> None:
    """Refuse our options in a client's ``mm_processor_kwargs``.

    Since 0.31, vLLM itself refuses the field, unless the operator trusts clients with it.

    Raises:
        BudgetError: There is one. The processor would take it for an option that we set ourselves.
    """
    sent = getattr(request, "mm_processor_kwargs", None) if versions.before("0.31") else None
    ours = sorted(key for key in sent or () if key.startswith(OPTION_PREFIXES))
    if ours:
        raise BudgetError(
            f"{ours[0]} is not allowed in mm_processor_kwargs: send {FIELD}, {METHOD_FIELD} and "
            f"{ESCALATE_FIELD} at the top level of the request, or in vllm_xargs.",
            param="mm_processor_kwargs",
        )


def pop_row_count(manager: Any, identifier: str, requests: Mapping[str, Any]) -> int:
    """Return how many rows the encoder cache counts for an image, and remove the entry.

    Before 0.31, the manager has an entry only for images that no request uses; otherwise the requests know.
    """
    if not versions.before("0.31"):
        return int(manager.num_embeds_by_hash.pop(identifier))
    if identifier in manager.freeable:
        return int(manager.freeable[identifier])
    request = requests[next(iter(manager.cached[identifier]))]
    names = [feature.identifier for feature in request.mm_features]
    return int(request.get_num_encoder_embeds(names.index(identifier)))


async def call_every_engine(client: Any, method: str, *arguments: object) -> Any:
    """Call a method of every engine of a client; one result per engine."""
    if versions.before("0.32"):
        calls = [client._call_utility_async(method, *arguments, engine=engine) for engine in client.core_engines]
        return await asyncio.gather(*calls)
    return await client.call_utility_all_async(method, *arguments)
