"""The scheduler's side of a failed image: end its requests, and leave nothing of it in any cache.

The worker put zeros where the image's rows belong and named the image in the step's result. The requests end
before vLLM looks at that result, so that no token computed from zeros leaves.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from promprune_vllm.engine import patches
from promprune_vllm.engine.compat import older_minors, versions
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.keys import FAILED, GONE
from promprune_vllm.metrics.recorder import recorder

logger = logging.getLogger("vllm.promprune")
_STEPS = 4  # more than are ever in flight at once: two


def patch_scheduler(original: Any) -> Any:
    """Wrap the choice of a scheduler's class.

    vLLM asks for it in the engine's process alone; to import it elsewhere would slow down every other one.
    """

    def get_scheduler_cls(self: Any) -> Any:
        scheduler = original(self)
        versions.require_names(versions.SCHEDULER_NAMES)
        patches.install(Stage.SCHEDULER)
        return scheduler

    return get_scheduler_cls


def end_failed_requests(original: Any) -> Any:
    """Wrap the handling of a step's result."""

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        failed = frozenset(getattr(model_runner_output, FAILED, ()))
        ended = _end(self, failed) if failed else ()
        outputs = original(self, scheduler_output, model_runner_output)
        _aborted_in_flight(self).append(set())
        if ended:
            _add_errors(outputs, ended)
        return outputs

    return update_from_output


def record_aborts(original: Any) -> Any:
    """Wrap the end of requests from outside: an aborted one may have left blocks that a step in flight fills."""

    def finish_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        finished = original(self, *args, **kwargs)
        for request in finished:
            if request.num_in_flight_tokens:
                _aborted_in_flight(self)[-1].update(feature.identifier for feature in request.mm_features)
        return finished

    return finish_requests


def _aborted_in_flight(scheduler: Any) -> deque[set[str]]:
    """Return the images of requests that ended in flight, by step."""
    gone: deque[set[str]] = scheduler.__dict__.setdefault(GONE, deque([set()], maxlen=_STEPS))
    return gone


def _end(scheduler: Any, failed: frozenset[str]) -> Sequence[Any]:
    """End every request that used rows of these images, and take what they left out of the caches."""
    from vllm.v1.request import RequestStatus

    requests = [request for request in scheduler.requests.values() if _used(request, failed)]
    blocks = _blocks(scheduler, requests, failed)
    ended: Sequence[Any] = scheduler.finish_requests(
        [request.request_id for request in requests], RequestStatus.FINISHED_ERROR
    )
    scheduler.kv_cache_manager.evict_blocks(blocks)
    for identifier in failed:
        _forget(scheduler.encoder_cache_manager, identifier, scheduler.requests)
    for images in _aborted_in_flight(scheduler):  # dealt with, the requests ended here among them
        images.difference_update(failed)
    ours = recorder(scheduler.vllm_config.model_config.served_model_name)
    for _ in ended:
        ours.outcome("failed")
    logger.error(
        "Visual tokens of %d image(s) could not be selected; the worker's log says why. Ended with an error: %s.",
        len(failed),
        ", ".join(request.request_id for request in ended) or "no request, all were gone",
    )
    return ended


def _used(request: Any, failed: frozenset[str]) -> bool:
    """Whether a request has any row of these images in its KV cache, or in a step under way.

    That includes one that got the image's rows from an earlier encoding, still good: they cannot be told apart,
    as a step in flight may have shared blocks between them. Preempted, it has no blocks but a token under way.
    """
    if request.is_finished():
        return False
    preempted_in_flight = request.num_stale_output_tokens > 0
    return any(
        feature.identifier in failed
        and (preempted_in_flight or request.num_computed_tokens > feature.mm_position.offset)
        for feature in request.mm_features
    )


def _blocks(scheduler: Any, requests: Iterable[Any], failed: frozenset[str]) -> set[int]:
    """Return the KV blocks computed from the images, or after them.

    A step in flight may have lent them to other requests already; those have the image as well, so are among
    ``requests`` with all their blocks. Where a request gave its blocks back while in flight, or a sliding window
    did, nobody knows any more which they were, and the whole prefix cache goes.
    """
    pool = scheduler.kv_cache_manager.block_pool
    blocks: set[int] = set()
    known = not any(failed & images for images in _aborted_in_flight(scheduler))
    for request in requests:
        groups = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        offset = min(each.mm_position.offset for each in request.mm_features if each.identifier in failed)
        # Groups may have blocks of other sizes than the scheduler's.
        first = offset // scheduler.block_size if len(groups) == 1 else 0
        for group in groups:
            blocks.update(group[first:])
        known = known and request.num_stale_output_tokens == 0
    if known and pool.null_block.block_id not in blocks:
        return blocks
    return {block.block_id for block in pool.blocks}


def _forget(manager: Any, identifier: str, requests: Mapping[str, Any]) -> None:
    """Take an image out of the scheduler's account of the encoder cache; the workers are told in the next step."""
    if identifier not in manager.cached:
        return
    rows = older_minors.take_rows(manager, identifier, requests)
    del manager.cached[identifier]
    manager.num_free_slots += rows
    if manager.freeable.pop(identifier, None) is None:  # a request that has not used it yet refers to it
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
