"""The worker's side of a failed image: it fails its own requests and nothing else.

An exception that leaves the model ends the engine and every request in it. So where an image cannot be encoded or
pruned, zeros take its place until the end of the step, and the step's result names the image. In the scheduler's
process ``failed_images`` ends its requests before any of their tokens is sent, and clears the caches.
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
    """One step of the worker: which images failed, and which ranks must agree on that.

    With tensor parallelism an exception may be raised on one rank alone. Selecting does not communicate, so the
    ranks agree afterwards on what failed. Encoding and projecting do communicate: ranks that part ways there would
    add up tensors of different images, so an exception ends the engine, as it does without us.
    """

    def __init__(self, ranks: int) -> None:
        self.filler: list[Tensor] = []
        self.single_rank = ranks == 1

    def fill(self, zeros: Tensor) -> Tensor:
        """Mark zeros as those that replace an image until its requests are ended."""
        setattr(zeros, FILLER, True)
        self.filler.append(zeros)
        return zeros

    def agreed(self, results: Sequence[_T | None]) -> list[_T | None]:
        """Return the results that all ranks have."""
        if self.single_rank:
            return list(results)
        failed = torch.tensor([result is None for result in results], dtype=torch.int32, device="cpu")
        torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX, group=get_tp_group().cpu_group)
        return [None if bad else result for bad, result in zip(failed.tolist(), results, strict=True)]


_step: ContextVar[Step | None] = ContextVar("promprune_step", default=None)


def in_step() -> bool:
    """Whether a worker's step is under way. Otherwise an encoder call is the profiling run's, or a test's."""
    return _step.get() is not None


class Guard(Protocol):
    """Runs the parts of an attempt to encode images: what happens to an exception is its decision."""

    def together(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        """Call a function in which ranks communicate. ``None``: it failed."""

    def alone(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        """Call a function in which they do not. ``None``: it failed on this rank."""

    def agreed(self, results: Sequence[_T | None]) -> list[_T | None]:
        """Return the results that all ranks have."""


class _NoGuard:
    """Lets every exception pass: outside a step nobody would end the requests."""

    def together(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        return function(*arguments)

    alone = together

    def agreed(self, results: Sequence[_T | None]) -> list[_T | None]:
        return list(results)


class _StepGuard:
    """Logs what fails for the given images and returns ``None`` for it."""

    def __init__(self, step: Step, jobs: Sequence[PruneJob]) -> None:
        self._step, self._jobs = step, jobs

    def together(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        return self.alone(function, *arguments) if self._step.single_rank else function(*arguments)

    def alone(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return function(*arguments)
        except torch.AcceleratorError:  # the device's state is lost, with everybody's KV cache
            raise
        except Exception as error:
            _log(self._jobs, error)
        # Return outside the handler: the exception's traceback would keep every tensor of the attempt alive.
        return None

    def agreed(self, results: Sequence[_T | None]) -> list[_T | None]:
        return self._step.agreed(results)


Attempt = Callable[[slice, Sequence[PruneJob], Guard], list[Tensor | None]]
"""Encodes some images under a guard: ``(kept, W)`` embeddings each, ``None`` for those that fail."""


def contain(
    attempt: Attempt, items: slice, jobs: Sequence[PruneJob], zeros: Callable[[int], Tensor]
) -> list[Tensor]:
    """Return the embeddings of some images, with zeros in place of those that fail.

    Args:
        attempt: Encodes them.
        items: Which images of the batch.
        jobs: One per image.
        zeros: Makes ``(rows, W)`` zeros.

    Raises:
        Exception: Whatever the attempt raises, outside a worker's step (the profiling run, for one).
    """
    step = _step.get()
    if step is None:
        return [rows for rows in attempt(items, jobs, _NoGuard()) if rows is not None]
    embeddings = attempt(items, jobs, _StepGuard(step, jobs))
    for i, job in enumerate(jobs if len(jobs) > 1 else ()):
        if embeddings[i] is None:  # again, with the memory for itself, and not because of another image
            at = items.start + i
            (embeddings[i],) = attempt(slice(at, at + 1), [job], _StepGuard(step, [job]))
    return [
        step.fill(zeros(job.kept)) if rows is None else rows for rows, job in zip(embeddings, jobs, strict=True)
    ]


def _log(jobs: Sequence[PruneJob], error: Exception) -> None:
    what = f"Selecting {' + '.join(f'{job.kept} of {job.total}' for job in jobs)} visual tokens"
    if len(jobs) > 1:
        logger.warning("%s failed (%s: %s). Trying image by image.", what, type(error).__name__, error)
        return
    logger.exception(
        "%s with method %r failed. Requests with this image end with an error (HTTP 500); other requests and the "
        "server continue. Out of memory: start with a lower --gpu-memory-utilization, or send smaller images. "
        "Anything else is a bug of the method: please report it with the traceback.",
        what,
        jobs[0].method.name,
    )


def can_contain(config: Any) -> bool:
    """Whether filler can be taken back everywhere it would get to.

    Pipeline and context parallelism have the result made by another rank than the one that encodes; connectors
    hand rows and blocks to others at once; other schedulers, cache managers and pooling have ways of their own.
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
    """Wrap a step of the worker: contain what fails in it, and find out which images those were."""

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
        return output if output is None else _report(self, output)

    return execute_model


def report_failed(original: Any) -> Any:
    """Wrap the second half of a step, which gives its result."""

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _report(self, original(self, *args, **kwargs))

    return sample_tokens


def drop_filler(original: Any) -> Any:
    """Wrap the choice of what to encode: filler that is still there must not pass for an encoded image."""

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
    """Return a runner's encoder cache: a mapping in vLLM's first runner, an attribute of one in the second."""
    cache = runner.encoder_cache
    rows: Mapping[str, Tensor] = getattr(cache, "encoder_outputs", cache)
    return rows


def _identifiers(rows: Mapping[str, Tensor], filler: Sequence[Tensor]) -> tuple[str, ...]:
    found = tuple(key for key, value in rows.items() if any(value is each for each in filler))
    if len(found) != len(filler):
        raise RuntimeError(
            f"{len(filler)} images failed and {len(found)} of them are in the encoder cache: their requests "
            "cannot be told from the others, and must not be answered. The causes are in the log above."
        )
    return found


def _report(runner: Any, output: Any) -> Any:
    """Put what failed into the step's result."""
    failed = getattr(runner, PENDING_FAILED_IMAGES, ())
    setattr(runner, PENDING_FAILED_IMAGES, ())
    if not failed:
        return output
    from vllm.v1.outputs import AsyncModelRunnerOutput

    if isinstance(output, AsyncModelRunnerOutput):
        get_output = output.get_output
        setattr(output, "get_output", lambda: _marked(get_output(), failed))  # noqa: B010  mypy: it is a method
        return output
    return _marked(output, failed)


def _marked(output: Any, failed: tuple[str, ...]) -> Any:
    marked = copy.copy(output)  # vLLM's empty result is one object for all steps
    setattr(marked, FAILED_IMAGES, failed)
    return marked
