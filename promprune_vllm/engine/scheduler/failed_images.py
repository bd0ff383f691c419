"""A failed image in the scheduler: end its requests and remove it from all caches.

The worker has put zeros in place of the image's rows and named the image in the step's result. The requests end
before vLLM processes that result, so no token computed from zeros is sent.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from promprune_vllm.engine import patches
from promprune_vllm.engine.compat import older_minors, parts, seams
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.keys import ABORTED_IN_FLIGHT, FAILED_IMAGES
from promprune_vllm.metrics.recorder import recorder

logger = logging.getLogger("vllm.promprune")
_STEPS = 4  # at most two are ever in flight


def patch_scheduler(original: Any) -> Any:
    """Wrap the selection of the scheduler class, and then patch the scheduler.

    vLLM calls this in the engine core only. Importing the scheduler in every process would slow down their start.
    """

    def get_scheduler_cls(self: Any) -> Any:
        scheduler = original(self)
        seams.require(parts.FAILED_IMAGES)
        patches.install(Stage.SCHEDULER)
        return scheduler

    return get_scheduler_cls


def end_failed_requests(original: Any) -> Any:
    """Wrap the handling of a step's result: first end the requests whose images failed."""

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        failed = frozenset(getattr(model_runner_output, FAILED_IMAGES, ()))
        ended = _end_requests(self, failed) if failed else ()
        outputs = original(self, scheduler_output, model_runner_output)
        _aborted_in_flight(self).append(set())
        if ended:
            _add_errors(outputs, ended)
        return outputs

    return update_from_output


def record_aborts(original: Any) -> Any:
    """Wrap the abort of requests: a step in flight may still fill the blocks of an aborted request."""

    def finish_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        finished = original(self, *args, **kwargs)
        for request in finished:
            if request.num_in_flight_tokens:
                _aborted_in_flight(self)[-1].update(feature.identifier for feature in request.mm_features)
        return finished

    return finish_requests


def _aborted_in_flight(scheduler: Any) -> deque[set[str]]:
    """Return the images of requests that ended while in flight, by step."""
    images: deque[set[str]] = scheduler.__dict__.setdefault(ABORTED_IN_FLIGHT, deque([set()], maxlen=_STEPS))
    return images


def _end_requests(scheduler: Any, failed: frozenset[str]) -> Sequence[Any]:
    """End every request that used rows of these images; remove the rows and their KV blocks from the caches."""
    from vllm.v1.request import RequestStatus

    requests = [request for request in scheduler.requests.values() if _uses_any(request, failed)]
    blocks = _tainted_blocks(scheduler, requests, failed)
    ended: Sequence[Any] = scheduler.finish_requests(
        [request.request_id for request in requests], RequestStatus.FINISHED_ERROR
    )
    scheduler.kv_cache_manager.evict_blocks(blocks)
    for identifier in failed:
        _evict_rows(scheduler.encoder_cache_manager, identifier, scheduler.requests)
    for images in _aborted_in_flight(scheduler):  # these are handled now, including the requests ended above
        images.difference_update(failed)
    ours = recorder(scheduler.vllm_config.model_config.served_model_name)
    for _ in ended:
        ours.outcome("failed")
    logger.error(
        "Visual tokens of %d image(s) could not be selected; the worker's log says why. Requests ended: %s.",
        len(failed),
        ", ".join(request.request_id for request in ended) or "none, all had already ended",
    )
    return ended


def _uses_any(request: Any, failed: frozenset[str]) -> bool:
    """Return whether a request has rows of these images in its KV cache or in a step in flight.

    This includes a request that got good rows from an earlier encoding: it cannot be told apart, because a step in
    flight may have shared blocks between requests. A preempted request has no blocks, but may have a token in
    flight.
    """
    if request.is_finished():
        return False
    preempted_in_flight = request.num_stale_output_tokens > 0
    return any(
        feature.identifier in failed
        and (preempted_in_flight or request.num_computed_tokens > feature.mm_position.offset)
        for feature in request.mm_features
    )


def _tainted_blocks(scheduler: Any, requests: Iterable[Any], failed: frozenset[str]) -> set[int]:
    """Return the KV blocks computed from the images or after them.

    A step in flight may already share them with other requests; those have the same image, so they are in
    ``requests`` with all their blocks. If a request, or a sliding window, freed blocks while in flight, nothing
    records which they were, and this returns all blocks: the whole prefix cache is evicted.
    """
    pool = scheduler.kv_cache_manager.block_pool
    blocks: set[int] = set()
    all_known = not any(failed & images for images in _aborted_in_flight(scheduler))
    for request in requests:
        groups = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        offset = min(each.mm_position.offset for each in request.mm_features if each.identifier in failed)
        # With several groups, their block sizes may differ from the scheduler's.
        first = offset // scheduler.block_size if len(groups) == 1 else 0
        for group in groups:
            blocks.update(group[first:])
        all_known = all_known and request.num_stale_output_tokens == 0
    if all_known and pool.null_block.block_id not in blocks:
        return blocks
    return {block.block_id for block in pool.blocks}


def _evict_rows(manager: Any, identifier: str, requests: Mapping[str, Any]) -> None:
    """Remove an image from the scheduler's view of the encoder cache. The next step makes the workers free it."""
    if identifier not in manager.cached:
        return
    rows = older_minors.pop_row_count(manager, identifier, requests)
    del manager.cached[identifier]
    manager.num_free_slots += rows
    if manager.freeable.pop(identifier, None) is None:  # a request that has not used it yet still refers to it
        manager.num_freeable_slots += rows
    manager.freed.append(identifier)


def _add_errors(outputs: dict[int, Any], ended: Iterable[Any]) -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    for request in ended:
        error = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(error)
