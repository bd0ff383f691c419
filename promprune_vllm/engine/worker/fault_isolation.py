"""A failed image in the worker: it ends only its own requests.

An exception in the model ends the engine and every request in it. So if an image cannot be encoded or pruned,
zeros replace it until the end of the step, and the step's result names the image. In the scheduler's process,
``failed_images`` ends its requests before any of their tokens is sent, and clears the caches.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group

from promprune_vllm.engine.keys import FAILED_IMAGES, FILLER, PENDING_FAILED_IMAGES
from promprune_vllm.engine.worker.encoded_image import PruneJob

logger = logging.getLogger("vllm.promprune")
_T = TypeVar("_T")


class Step:
    """One step of the worker, and the images that failed in it.

    With tensor parallelism, an exception may be raised on a single rank. Selection does not communicate, so the
    ranks agree afterwards on what failed. Encoding and projecting do communicate: if ranks diverged there, they
    would add up tensors of different images. So there an exception ends the engine, as it does without the plugin.
    """

    def __init__(self, ranks: int) -> None:
        self.filler: list[Tensor] = []
        self.single_rank = ranks == 1

    def fill(self, zeros: Tensor) -> Tensor:
        """Mark zeros as filler: they replace an image until its requests have ended."""
        setattr(zeros, FILLER, True)
        self.filler.append(zeros)
        return zeros

    def agree(self, results: Sequence[_T | None]) -> list[_T | None]:
        """Return the results, with ``None`` for each that failed on any rank."""
        return list(results) if self.single_rank else agree(results)


def agree(results: Sequence[_T | None]) -> list[_T | None]:
    """Return the results, with ``None`` for each that is ``None`` on any rank. Every rank must call this."""
    missing = torch.tensor([result is None for result in results], dtype=torch.int32, device="cpu")
    torch.distributed.all_reduce(missing, torch.distributed.ReduceOp.MAX, group=get_tp_group().cpu_group)
    return [None if bad else result for bad, result in zip(missing.tolist(), results, strict=True)]


_step: ContextVar[Step | None] = ContextVar("promprune_step", default=None)


def in_step() -> bool:
    """Return whether a worker's step is running. If not, an encoder call is the profiling run's, or a test's."""
    return _step.get() is not None


class Guard(Protocol):
    """Runs the parts of an attempt to encode images, and decides what happens to exceptions."""

    def run_together(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        """Call a function in which ranks communicate. Return ``None`` if it failed."""

    def run_alone(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        """Call a function in which ranks do not communicate. Return ``None`` if it failed on this rank."""

    def agree(self, results: Sequence[_T | None]) -> list[_T | None]:
        """Return the results, with ``None`` for each that failed on any rank."""


class _NoGuard:
    """Passes every exception on: outside a step, nothing would end the requests."""

    def run_together(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        return function(*arguments)

    run_alone = run_together

    def agree(self, results: Sequence[_T | None]) -> list[_T | None]:
        return list(results)


class _StepGuard:
    """Logs the exceptions of some images and returns ``None`` in place of their results."""

    def __init__(self, step: Step, jobs: Sequence[PruneJob]) -> None:
        self._step, self._jobs = step, jobs

    def run_together(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        return self.run_alone(function, *arguments) if self._step.single_rank else function(*arguments)

    def run_alone(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return function(*arguments)
        except torch.AcceleratorError:  # the device's state is lost, including the KV cache of all requests
            raise
        except Exception as error:
            _log_failure(self._jobs, error)
        # Return outside the handler: the exception's traceback would keep every tensor of the attempt alive.
        return None

    def agree(self, results: Sequence[_T | None]) -> list[_T | None]:
        return self._step.agree(results)


Attempt = Callable[[slice, Sequence[PruneJob], Guard], list[Tensor | None]]
"""Encodes some images under a guard; returns ``(rows, W)`` embeddings per image, ``None`` for failed ones."""


def contain(
    attempt: Attempt, items: slice, jobs: Sequence[PruneJob], zeros: Callable[[int], Tensor]
) -> list[Tensor]:
    """Return the embeddings of some images, with zeros in place of those that fail.

    Args:
        attempt: Encodes the images.
        items: Which images of the batch.
        jobs: One per image.
        zeros: Returns ``(rows, W)`` zeros.

    Raises:
        Exception: Any exception of the attempt, if no worker's step is running (as in the profiling run).
    """
    step = _step.get()
    if step is None:
        return [rows for rows in attempt(items, jobs, _NoGuard()) if rows is not None]
    embeddings = attempt(items, jobs, _StepGuard(step, jobs))
    for i, job in enumerate(jobs if len(jobs) > 1 else ()):
        if embeddings[i] is None:  # retry alone: another image may have failed, or memory may suffice now
            index = items.start + i
            (embeddings[i],) = attempt(slice(index, index + 1), [job], _StepGuard(step, [job]))
    return [
        step.fill(zeros(job.rows)) if rows is None else rows for rows, job in zip(embeddings, jobs, strict=True)
    ]


def _log_failure(jobs: Sequence[PruneJob], error: Exception) -> None:
    task = f"Selecting {' + '.join(f'{job.kept} of {job.total}' for job in jobs)} visual tokens"
    if len(jobs) > 1:
        logger.warning("%s failed (%s: %s). Trying image by image.", task, type(error).__name__, error)
        return
    logger.exception(
        "%s with method %r failed. Requests with this image end with an error (HTTP 500); other requests and the "
        "server continue. If memory ran out, start with a lower --gpu-memory-utilization, or send smaller images. "
        "Anything else is a bug in the method: please report it with the traceback.",
        task,
        jobs[0].method.name,
    )


def can_contain(config: Any) -> bool:
    """Return whether filler can be removed from every place it may reach.

    With pipeline or context parallelism, the rank that returns the result is not the one that encodes. Connectors
    send rows and blocks to other engines at once. Custom schedulers, custom cache managers and pooling models
    handle results and caches in other ways.
    """
    parallel = config.parallel_config
    return (
        parallel.pipeline_parallel_size == parallel.prefill_context_parallel_size == 1
        and config.kv_transfer_config is None
        and config.ec_transfer_config is None
        and config.ec_manager_config.encoder_cache_manager_cls is None
        and config.scheduler_config.scheduler_cls is None
        and config.model_config.runner_type == "generate"
    )


def contain_step(original: Any) -> Any:
    """Wrap a step of the worker: contain failures, and note which images failed."""

    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not can_contain(self.vllm_config):
            return original(self, *args, **kwargs)
        step = Step(self.vllm_config.parallel_config.tensor_parallel_size)
        token = _step.set(step)
        try:
            output = original(self, *args, **kwargs)
        finally:
            _step.reset(token)
        if step.filler:
            setattr(self, PENDING_FAILED_IMAGES, _identifiers(cached_rows(self), step.filler))
        return output if output is None else _add_failed(self, output)

    return execute_model


def report_failed(original: Any) -> Any:
    """Wrap the second half of a step, which returns its result: name the failed images in the result."""

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _add_failed(self, original(self, *args, **kwargs))

    return sample_tokens


def drop_filler(original: Any) -> Any:
    """Wrap the selection of images to encode: remaining filler must not be taken for an encoded image."""

    def prepare_mm_inputs(self: Any, scheduled_encoder_inputs: Mapping[str, Sequence[int]]) -> Any:
        rows = self.encoder_cache.encoder_outputs
        for request, inputs in scheduled_encoder_inputs.items():
            for i in inputs:
                identifier = self.encoder_cache.mm_features[request][i].identifier
                if hasattr(rows.get(identifier), FILLER):
                    del rows[identifier]
        return original(self, scheduled_encoder_inputs)

    return prepare_mm_inputs


def cached_rows(runner: Any) -> Mapping[str, Tensor]:
    """Return a runner's encoder cache: in Model Runner V1 it is a mapping, in V2 an object with a mapping."""
    cache = runner.encoder_cache
    rows: Mapping[str, Tensor] = getattr(cache, "encoder_outputs", cache)
    return rows


def _identifiers(rows: Mapping[str, Tensor], filler: Sequence[Tensor]) -> tuple[str, ...]:
    """Return the cache identifiers of failed images, by finding their filler in the encoder cache."""
    identifiers = tuple(key for key, value in rows.items() if any(value is each for each in filler))
    if len(identifiers) != len(filler):
        raise RuntimeError(
            f"{len(filler)} images failed and {len(identifiers)} of them are in the encoder cache: their requests "
            "cannot be identified, and must not be answered. The log above has the causes."
        )
    return identifiers


def _add_failed(runner: Any, output: Any) -> Any:
    """Name the failed images in the step's result."""
    failed = getattr(runner, PENDING_FAILED_IMAGES, ())
    setattr(runner, PENDING_FAILED_IMAGES, ())
    if not failed:
        return output
    from vllm.v1.outputs import AsyncModelRunnerOutput

    if isinstance(output, AsyncModelRunnerOutput):
        get_output = output.get_output
        setattr(output, "get_output", lambda: _with_failed(get_output(), failed))  # noqa: B010  mypy: a method
        return output
    return _with_failed(output, failed)


def _with_failed(output: Any, failed: tuple[str, ...]) -> Any:
    copied = copy.copy(output)  # a copy: vLLM's empty result is one object for all steps
    setattr(copied, FAILED_IMAGES, failed)
    return copied
