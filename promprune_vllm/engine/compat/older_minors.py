"""How older vLLM minors differ where this plugin touches them. Everything else is written against the newest.

An adapter gives an older minor what the newest has, with the newest's own defaults, before anything here is used.
So whoever reads ``processor.py`` reads the newest vLLM, and to drop a minor is to delete its lines here and in
``versions.BEFORE``. On the newest minor nothing in this file does anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.engine.compat import versions
from promprune_vllm.engine.keys import OURS
from promprune_vllm.errors import BudgetError

_inputs: ContextVar[Any] = ContextVar("promprune_processor_inputs", default=None)


def add_mm_hashes(_: None) -> Any:
    """Return 0.32's method that makes cache keys."""
    return _get_mm_hashes


def add_missing_kwargs(_: None) -> Any:
    """Return 0.32's method that gives the options for images that the cache lacks."""
    return _get_cache_missing_processor_kwargs


def add_dummy_inputs(_: None) -> Any:
    """Return 0.31's method that makes the inputs of the memory profile."""
    return _get_dummy_inputs


def _get_mm_hashes(self: Any, inputs: Any) -> Any:
    """As 0.32 has it."""
    return inputs.get_mm_hashes(self.info.model_id, self.info.ctx.get_mm_config().mm_hasher_algorithm)


def _get_cache_missing_processor_kwargs(self: Any, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:  # noqa: ARG001
    """As 0.32 has it."""
    options: Mapping[str, object] = inputs.hf_processor_mm_kwargs
    return options


def ask_for_hashes(original: Any) -> Any:
    """Wrap the processing of a prompt: its images' cache keys come from the processor, as in 0.32."""

    def cached_apply_hf_processor(self: Any, inputs: Any, timing_ctx: Any) -> Any:
        asking = replace(inputs)
        asking.get_mm_hashes = lambda *_, **__: self._get_mm_hashes(inputs)
        token = _inputs.set(asking)
        try:
            return original(self, asking, timing_ctx)
        finally:
            _inputs.reset(token)

    return cached_apply_hf_processor


def ask_for_options(original: Any) -> Any:
    """Wrap the look into the cache: what is processed next is what it lacks, with options for just that.

    vLLM reads the options from ``inputs`` only after this, and those are this prompt's own copy.
    """

    def get_cache_missing_items(self: Any, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        mm_is_cached, missing = original(self, cache, mm_data_items, mm_hashes)
        inputs = _inputs.get()
        if inputs is not None:  # else a model of vLLM's with a way of its own, which has no hooks
            inputs.hf_processor_mm_kwargs = self._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        return mm_is_cached, missing

    return get_cache_missing_items


def _get_dummy_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the inputs of the memory profile: in 0.30 they are the builder's own business."""
    return type(self.dummy_inputs).get_dummy_processor_inputs(self.dummy_inputs, *args, **kwargs)


def make_dummies(original: Any) -> Any:
    """Wrap the making of a processor: the profile's inputs come from it, as in 0.31."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.dummy_inputs.get_dummy_processor_inputs = self.get_dummy_inputs

    return init


def processors(renderer: Any) -> Iterable[Any]:
    """Return every processor of a renderer: before 0.31 the tokenize endpoint has one of its own."""
    found = [renderer.mm_processor]
    if versions.before("0.31"):
        found.append(renderer._readonly_mm_processor)
    return [processor for processor in found if processor is not None]


def processor_cache(processor: Any, inputs: Any) -> Any:
    """Return the cache that a prompt is processed with, or ``None``: before 0.31 it is the processor's own."""
    return processor.cache if versions.before("0.31") else inputs.cache


def refuse_smuggled(request: Any) -> None:
    """Refuse options of ours among a client's processor options; since 0.31, vLLM's gate refuses all of those.

    Raises:
        BudgetError: There are any. They would come to the processor as what our front doors put there.
    """
    sent = getattr(request, "mm_processor_kwargs", None) if versions.before("0.31") else None
    ours = sorted(key for key in sent or () if key.startswith(OURS))
    if ours:
        raise BudgetError(
            f"{ours[0]} in mm_processor_kwargs is not looked at: send {FIELD} and {METHOD_FIELD} at the top level "
            "of the request, or in vllm_xargs.",
            param="mm_processor_kwargs",
        )


def take_rows(manager: Any, identifier: str, requests: Mapping[str, Any]) -> int:
    """Return how many rows an image has in the account of the encoder cache, and drop the note of it.

    Before 0.31 that is noted of images without a request only, and is the requests' own business else.
    """
    if not versions.before("0.31"):
        return int(manager.num_embeds_by_hash.pop(identifier))
    if identifier in manager.freeable:
        return int(manager.freeable[identifier])
    request = requests[next(iter(manager.cached[identifier]))]
    names = [feature.identifier for feature in request.mm_features]
    return int(request.get_num_encoder_embeds(names.index(identifier)))


async def call_every_engine(client: Any, method: str, *arguments: object) -> Any:
    """Call a method of every engine behind a client: one result each."""
    if versions.before("0.32"):
        calls = [client._call_utility_async(method, *arguments, engine=engine) for engine in client.core_engines]
        return await asyncio.gather(*calls)
    return await client.call_utility_all_async(method, *arguments)
