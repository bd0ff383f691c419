"""Turns vLLM's inputs for a batch of images into K embeddings per image: encode, select, assemble.

``fault_isolation`` handles images that fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from promprune_vllm.engine.worker import fault_isolation
from promprune_vllm.engine.worker.encoded_image import EncodedImage, PruneJob
from promprune_vllm.engine.worker.fault_isolation import Guard


class Model(Protocol):
    """The part of a family's ``PrunedModelMixin`` that this module uses."""

    def encode(self, inputs: dict[str, Any], items: slice, jobs: Sequence[PruneJob]) -> list[EncodedImage]:
        """Encode some of the images and capture the features that their methods use."""

    def select(self, image: EncodedImage, job: PruneJob) -> Callable[[], Tensor]:
        """Select an image's tokens, and return a function that assembles their ``(rows, W)`` embeddings."""

    def zeros(self, rows: int) -> Tensor:
        """Return ``(rows, W)`` zeros."""

    def remember(self, image: EncodedImage, job: PruneJob) -> None:
        """Store an image whose rows are ready, if images are stored."""

    def forget(self, job: PruneJob) -> None:
        """Remove an image that failed from those stored."""

    def batch_done(self, jobs: Sequence[PruneJob]) -> None:
        """Update the metrics after one call of the encoder."""


def embed_images(model: Model, inputs: dict[str, Any], jobs: Sequence[PruneJob], limit: int) -> list[Tensor]:
    """Return the ``(rows, W)`` embeddings of each image of a batch; see ``PruneJob.rows``.

    Args:
        model: Encodes and selects.
        inputs: vLLM's inputs for the batch.
        jobs: One per image.
        limit: Maximum of unpruned tokens per encoder call.
    """
    embeddings: list[Tensor] = []
    for items in micro_batches([job.total for job in jobs], limit):
        encode = partial(_embed, model, inputs)
        embeddings += fault_isolation.contain(encode, items, jobs[items], model.zeros)
        model.batch_done(jobs[items])
    return embeddings


def _embed(
    model: Model, inputs: dict[str, Any], items: slice, jobs: Sequence[PruneJob], guard: Guard
) -> list[Tensor | None]:
    """Return the embeddings of some images, ``None`` for those that failed."""
    images = guard.run_together(model.encode, inputs, items, jobs)
    if images is None:
        for job in jobs:
            model.forget(job)
        return [None for _ in jobs]
    selected = guard.agree([guard.run_alone(model.select, *pair) for pair in zip(images, jobs, strict=True)])
    embeddings = [
        None if assemble is None else guard.run_together(_assemble_checked, assemble, job.rows)
        for assemble, job in zip(selected, jobs, strict=True)
    ]
    for image, job, rows in zip(images, jobs, embeddings, strict=True):
        if rows is None:
            model.forget(job)
        else:
            model.remember(image, job)
    return embeddings


def _assemble_checked(assemble: Callable[[], Tensor], count: int) -> Tensor:
    rows = assemble()
    if rows.ndim != 2 or rows.shape[0] != count:
        raise RuntimeError(f"got rows of shape {tuple(rows.shape)} for a placeholder of {count} tokens")
    return rows


def sources(jobs: Sequence[PruneJob], found: Sequence[EncodedImage | None]) -> list[int]:
    """Return for each job the index of the image that it uses, which is missing unless it was found.

    It is the job's own, or of several jobs for an image that is missing, the first one's.
    """
    first: dict[object, int] = {}
    own = range(len(jobs))
    return [i if found[i] is not None or jobs[i].key is None else first.setdefault(jobs[i].key, i) for i in own]


def runs(indices: Sequence[int]) -> Iterator[slice]:
    """Return the runs of consecutive numbers among ascending indices."""
    start = 0
    for i, index in enumerate(indices, 1):
        if i == len(indices) or indices[i] != index + 1:
            yield slice(indices[start], index + 1)
            start = i


def micro_batches(totals: Sequence[int], limit: int) -> Iterator[slice]:
    """Split a batch so that no encoder call has more than ``limit`` UNPRUNED tokens (or one image).

    vLLM's scheduler counts only the tokens that an image keeps, so a step may contain many more images than the
    profiling run allowed for.
    """
    start, tokens = 0, 0
    for i, total in enumerate(totals):
        if i > start and tokens + total > limit:
            yield slice(start, i)
            start, tokens = i, 0
        tokens += total
    if start < len(totals):
        yield slice(start, len(totals))
