"""The worker's side: encode, select, hand over K rows per image."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from promprune_vllm.config import Settings
from promprune_vllm.engine import families
from promprune_vllm.engine.image import EncodedImage
from promprune_vllm.engine.processor import COUNTS
from promprune_vllm.metrics.recorder import recorder


class PrunedModelMixin:
    """Goes before vLLM's model class in a family's bases.

    A family defines ``capture(inputs, items, needs)`` and, where it supplies ``ENCODER``, ``project(rows)``.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._settings = Settings.from_environment()
        self._method = self._settings.selector(families.calibration(vllm_config.model_config.architectures))
        self._encoder_tokens = int(vllm_config.scheduler_config.max_num_encoder_input_tokens)
        self._timer = SelectionTimer(vllm_config.device_config.device) if _is_first_rank() else None

    def embed_unpruned(self, **inputs: Any) -> Any:
        """Encode as vLLM does: every token of every image."""
        return super().embed_multimodal(**inputs)  # type: ignore[misc]

    def embed_multimodal(self, **inputs: Any) -> Any:
        """Encode a batch of images and return the rows that enter the language model, K of N per image.

        Args:
            inputs: vLLM's inputs, plus ``(B, 2)`` token counts (seen, kept) from our processor; without
                them, or where nothing is pruned, this is vLLM's own method.
        """
        counts = inputs.pop(COUNTS, None)
        pairs = [] if counts is None else [(int(seen), int(kept)) for seen, kept in counts]
        if all(seen == kept for seen, kept in pairs):
            return self.with_positions(self.embed_unpruned(**inputs))
        outputs: list[Tensor] = []
        for items in micro_batches([seen for seen, _ in pairs], self._encoder_tokens):
            images: Sequence[EncodedImage]
            images = self.capture(inputs, items, self._method.needs)  # type: ignore[attr-defined]
            outputs += [self._prune(image, *pair) for image, pair in zip(images, pairs[items], strict=True)]
        return outputs

    def with_positions(self, embeddings: Any) -> Any:
        """Mark unpruned embeddings with their positions, where the model's positions do not follow from order."""
        return embeddings

    def place(self, rows: Tensor, image: EncodedImage, places: Tensor) -> Tensor:  # noqa: ARG002
        """Mark the kept rows of one image with their positions, where those do not follow from their order."""
        return rows

    def _prune(self, image: EncodedImage, seen: int, kept: int) -> Tensor:
        if image.rows.shape[0] != seen:
            raise RuntimeError(f"the encoder gave {image.rows.shape[0]} tokens where the processor counted {seen}")
        if kept == seen:
            (rows,) = self.with_positions([image.rows])
            return cast(Tensor, rows)
        with self._timer or nullcontext():
            rows, places = image.pruned(kept, self._method, self.project)  # type: ignore[attr-defined]
        return self.place(rows, image, places)


def micro_batches(seen: Sequence[int], limit: int) -> Iterator[slice]:
    """Split a batch so that no encoder call sees more than ``limit`` UNPRUNED tokens (or one image).

    vLLM's scheduler charges an image what it keeps, so a step may bring many more images than the memory
    profile of the encoder allowed for.
    """
    start, tokens = 0, 0
    for i, count in enumerate(seen):
        if i > start and tokens + count > limit:
            yield slice(start, i)
            start, tokens = i, 0
        tokens += count
    if start < len(seen):
        yield slice(start, len(seen))


class SelectionTimer:
    """Observes selection times; on CUDA from events that are read later, so that nothing waits."""

    def __init__(self, device: torch.device | None) -> None:
        self._recorder = recorder()
        self._cuda = device is not None and device.type == "cuda"
        self._pending: list[tuple[Any, Any]] = []
        self._start: Any = None

    def __enter__(self) -> None:
        self._start = self._mark()

    def __exit__(self, *_: object) -> None:
        if not self._cuda:
            self._recorder.selection(time.perf_counter() - self._start)
            return
        self._pending.append((self._start, self._mark()))
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.pop(0)
            self._recorder.selection(start.elapsed_time(end) / 1000)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _is_first_rank() -> bool:
    return int(get_tensor_model_parallel_rank()) == 0
