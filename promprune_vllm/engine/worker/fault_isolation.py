"""The worker's side of a failed image: it must fail its own requests, and nothing else.

An exception that left the model would end the engine, and every request in it. So where an image's rows cannot
be had, zeros take their place until the end of the step, and the step's result names the image. In the
scheduler's process ``failed_images`` ends its requests before any of their tokens leaves, and clears the caches.
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

from promprune_vllm.engine.keys import FAILED, FILLER, PENDING_FAILED
from promprune_vllm.engine.worker.encoded_image import EncodedImage, PruneJob

logger = logging.getLogger("vllm.promprune")
_T = TypeVar("_T")


class Model(Protocol):
    """What is asked of a ``PrunedModelMixin`` with its family."""

    def encoded(self, inputs: dict[str, Any], items: slice, jobs: Sequence[PruneJob]) -> list[EncodedImage]:
        """Encode some of the images with all that their methods look at."""

    def choose(self, image: EncodedImage, job: PruneJob) -> Callable[[], Tensor]:
        """Select an image's tokens, and return what makes its rows of the selection."""

    def zeros(self, rows: int) -> Tensor:
        """Return as many rows of zeros, as wide as the model's own."""


class Step:
    """One step of the worker: what was filled in, and who must agree to that.

    With tensor parallelism an exception may come up on one rank alone. Choosing communicates nothing, so there
    the ranks agree afterwards on what failed. Encoding and projecting do: ranks that part ways in there would
    add up tensors of different images, so an exception ends the engine, as it does without us.
    """

    def __init__(self, ranks: int) -> None:
        self.filler: list[Tensor] = []
        self.alone = ranks == 1

    def fill(self, model: Model, rows: int) -> Tensor:
        """Return what stands in for an image's rows until its requests are ended."""
        filler = model.zeros(rows)
        setattr(filler, FILLER, True)
        self.filler.append(filler)
        return filler

    def agreed(self, results: Sequence[_T | None]) -> list[_T | None]:
        """Return the results that all ranks have."""
        if self.alone:
            return list(results)
        failed = torch.tensor([result is None for result in results], dtype=torch.int32, device="cpu")
        torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX, group=get_tp_group().cpu_group)
        return [None if bad else result for bad, result in zip(failed.tolist(), results, strict=True)]


_step: ContextVar[Step | None] = ContextVar("promprune_step", default=None)


def in_step() -> bool:
    """Whether a worker's step is under way: else an encoder call is the memory profile's, or a test's."""
    return _step.get() is not None


def embed(model: Model, inputs: dict[str, Any], items: slice, jobs: Sequence[PruneJob]) -> list[Tensor]:
    """Return the rows of some images, ``(kept, W)`` each.

    Outside a worker's step, in the memory profile for one, nobody would end the requests: exceptions pass.
    """
    step = _step.get()
    if step is None:
        images = model.encoded(inputs, items, jobs)
        return [_finished(model.choose(image, job), job.kept) for image, job in zip(images, jobs, strict=True)]
    rows = _attempt(step, model, inputs, items, jobs)
    for i, job in enumerate(jobs if len(jobs) > 1 else ()):
        if rows[i] is None:  # once more, with the memory for itself, and not for a neighbour's sake
            at = items.start + i
            (rows[i],) = _attempt(step, model, inputs, slice(at, at + 1), [job])
    return [step.fill(model, job.kept) if image is None else image for image, job in zip(rows, jobs, strict=True)]


def _attempt(
    step: Step, model: Model, inputs: dict[str, Any], items: slice, jobs: Sequence[PruneJob]
) -> list[Tensor | None]:
    """Return the rows of some images, or ``None`` for those that fail."""
    what = f"Selecting {' + '.join(f'{job.kept} of {job.seen}' for job in jobs)} visual tokens"
    methods = ", ".join(sorted({job.method.name for job in jobs}))

    def guarded(contain: bool, function: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return function(*arguments)
        except torch.AcceleratorError:  # the device's state is lost, with everybody's KV cache
            raise
        except Exception as error:
            if not contain:
                raise
            _log(what, methods, error, last=len(jobs) == 1)
        # Left without the exception, whose traceback would keep every tensor of the attempt.
        return None

    images = guarded(step.alone, model.encoded, inputs, items, jobs)
    if images is None:
        return [None for _ in jobs]
    chosen = step.agreed([guarded(True, model.choose, *pair) for pair in zip(images, jobs, strict=True)])
    return [
        None if finish is None else guarded(step.alone, _finished, finish, job.kept)
        for finish, job in zip(chosen, jobs, strict=True)
    ]


def _finished(finish: Callable[[], Tensor], kept: int) -> Tensor:
    rows = finish()
    if rows.ndim != 2 or rows.shape[0] != kept:
        raise RuntimeError(f"{tuple(rows.shape)} rows were made where the placeholder has {kept}")
    return rows


def _log(what: str, method: str, error: Exception, *, last: bool) -> None:
    if not last:
        logger.warning("%s failed (%s: %s). Trying image by image.", what, type(error).__name__, error)
        return
    logger.exception(
        "%s with method %r failed. Requests with this image end with an error (HTTP 500); the others, and the "
        "server, go on. Out of memory: start with a lower --gpu-memory-utilization, or send smaller images. "
        "Anything else is a bug of the method: please report it with the traceback.",
        what,
        method,
    )


def containable(config: Any) -> bool:
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
        if not containable(self.vllm_config):
            return original(self, *args, **kwargs)
        step = Step(self.vllm_config.parallel_config.tensor_parallel_size)
        token = _step.set(step)
        try:
            output = original(self, *args, **kwargs)
        finally:
            _step.reset(token)
        if step.filler:
            setattr(self, PENDING_FAILED, _identifiers(cached_rows(self), step.filler))
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
    failed = getattr(runner, PENDING_FAILED, ())
    setattr(runner, PENDING_FAILED, ())
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
    setattr(marked, FAILED, failed)
    return marked
