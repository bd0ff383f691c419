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
        """Select an image's tokens, and return a function that assembles their ``(kept, W)`` embeddings."""

    def zeros(self, rows: int) -> Tensor:
        """Return ``(rows, W)`` zeros."""

    def batch_done(self, jobs: Sequence[PruneJob]) -> None:
        """Update the metrics after one call of the encoder."""


def embed_images(model: Model, inputs: dict[str, Any], jobs: Sequence[PruneJob], limit: int) -> list[Tensor]:
    """Return the ``(kept, W)`` embeddings of each image of a batch.

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
        return [None for _ in jobs]
    selected = guard.agree([guard.run_alone(model.select, *pair) for pair in zip(images, jobs, strict=True)])
    return [
        None if assemble is None else guard.run_together(_assemble_checked, assemble, job.kept)
        for assemble, job in zip(selected, jobs, strict=True)
    ]


def _assemble_checked(assemble: Callable[[], Tensor], kept: int) -> Tensor:
    rows = assemble()
    if rows.ndim != 2 or rows.shape[0] != kept:
        raise RuntimeError(f"got rows of shape {tuple(rows.shape)} for a placeholder of {kept} tokens")
    return rows


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
