"""The worker's side: encode, select, hand over K rows per image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from promprune_vllm.config import Settings
from promprune_vllm.core.features import Need
from promprune_vllm.engine import families, patches
from promprune_vllm.engine.compat import versions
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.keys import COUNTS, TEXT
from promprune_vllm.engine.worker import fault_isolation, selection_trace
from promprune_vllm.engine.worker.encoded_image import EncodedImage, PruneJob
from promprune_vllm.engine.worker.selection_metrics import SelectionWatch
from promprune_vllm.engine.worker.selection_trace import Trace
from promprune_vllm.kernels import ops
from promprune_vllm.metrics.recorder import recorder

versions.require_names(versions.RESULT_NAMES)


class PrunedModelMixin:
    """Goes before vLLM's model class in a family's bases.

    A family defines ``capture(inputs, items, needs)`` and, where it supplies ``ENCODER``, ``project(rows)``.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._settings = Settings.from_environment()
        calibration = families.calibration(vllm_config.model_config)
        self._methods = [self._settings.selector(calibration, method) for method in self._settings.allowed]
        self._encoder_tokens = int(vllm_config.scheduler_config.max_num_encoder_input_tokens)
        model, device = vllm_config.model_config, vllm_config.device_config.device
        self._watch = SelectionWatch(device, recorder(model.served_model_name)) if _is_first_rank() else None
        self._no_rows = torch.empty((0, model.get_inputs_embeds_size()), dtype=model.dtype, device=device)
        patches.install(Stage.WORKER)
        patches.install(Stage.WORKER_V2 if vllm_config.use_v2_model_runner else Stage.WORKER_V1)
        if device.type == "cpu":
            patches.install(Stage.WORKER_CPU)
        ops.warm_up(device)  # never in the first request

    def embed_unpruned(self, **inputs: Any) -> Any:
        """Encode as vLLM does: every token of every image."""
        outputs = super().embed_multimodal(**inputs)  # type: ignore[misc]
        if outputs is not None and len(outputs):  # the memory profile comes by here before any request
            self._no_rows = outputs[0].new_empty((0, outputs[0].shape[-1]))
        return outputs

    def zeros(self, rows: int) -> Tensor:
        """Return as many rows of zeros as wide as those of ``embed_multimodal``."""
        (zeros,) = self.with_positions([self._no_rows.new_zeros((rows, self._no_rows.shape[1]))])
        return cast(Tensor, zeros)

    def embed_multimodal(self, **inputs: Any) -> Any:
        """Encode a batch of images and return the rows that enter the language model, K of N per image.

        Args:
            inputs: vLLM's inputs, plus ``(B, 3)`` counts (tokens seen, kept, index of the method) and the text
                from our processor; without them, or where nothing is pruned, this is vLLM's own method.
        """
        counts, texts = inputs.pop(COUNTS, None), inputs.pop(TEXT, None)
        jobs = [] if counts is None else [self._job(row, texts, i) for i, row in enumerate(counts.tolist())]
        if all(job.seen == job.kept for job in jobs):
            embeddings = self.with_positions(self.embed_unpruned(**inputs))
            self._encoded(jobs)
            return embeddings
        outputs: list[Tensor] = []
        for items in micro_batches([job.seen for job in jobs], self._encoder_tokens):
            outputs += fault_isolation.embed(self, inputs, items, jobs[items])
            self._encoded(jobs[items])
        return outputs

    def _encoded(self, jobs: Sequence[PruneJob]) -> None:
        # Outside a worker's step these are the memory profile's images, not a request's.
        if self._watch is not None and jobs and fault_isolation.in_step():
            self._watch.flush(sum(job.seen for job in jobs))

    def _job(self, counts: list[int], texts: Sequence[Tensor] | None, image: int) -> PruneJob:
        seen, kept, method = counts
        selector = self._methods[method]
        wants_text = kept < seen and texts is not None and Need.TEXT in selector.needs
        return PruneJob(seen, kept, selector, texts[image] if wants_text and texts is not None else None)

    def encoded(self, inputs: dict[str, Any], items: slice, jobs: Sequence[PruneJob]) -> list[EncodedImage]:
        """Encode some of the images with all that their methods look at."""
        needs = Need.PROJECTED
        for job in jobs:
            needs |= job.method.needs
        images: list[EncodedImage] = self.capture(inputs, items, needs)  # type: ignore[attr-defined]
        return [
            image if job.text is None else image.with_text(self.get_language_model().embed_input_ids(job.text))  # type: ignore[attr-defined]
            for image, job in zip(images, jobs, strict=True)
        ]

    def with_positions(self, embeddings: Any) -> Any:
        """Mark unpruned embeddings with their positions, where the model's positions do not follow from order."""
        return embeddings

    def place(self, rows: Tensor, image: EncodedImage, places: Tensor) -> Tensor:  # noqa: ARG002
        """Mark the kept rows of one image with their positions, where those do not follow from their order."""
        return rows

    def choose(self, image: EncodedImage, job: PruneJob) -> Callable[[], Tensor]:
        """Select an image's tokens, and return what makes its ``(kept, W)`` rows of the selection.

        Two steps, since only the second may communicate between ranks: see ``fault_isolation.Step``.
        """
        if len(image.rows) != job.seen:
            raise RuntimeError(f"the encoder gave {len(image.rows)} tokens where the processor counted {job.seen}")
        if job.kept == job.seen:
            return lambda: cast(Tensor, self.with_positions([image.rows])[0])
        method = job.method.name
        with self._timing(method, "choose") as choosing:
            chosen = image.choose(job.kept, job.method)
        if self._watch is not None:
            self._watch.chosen(method, chosen)

        def finish() -> Tensor:
            with self._timing(method, "assemble") as assembling:
                rows, places = chosen.rows(self.project)  # type: ignore[attr-defined]
                placed = self.place(rows, image, places)
            if self._watch is not None and self._settings.inspector:
                selection_trace.attach_trace(placed, Trace.of(method, chosen, [choosing, assembling]))
            return placed

        return finish

    def _timing(self, method: str, stage: str) -> AbstractContextManager[list[Any]]:
        return nullcontext([]) if self._watch is None else self._watch.timing(method, stage)


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


def _is_first_rank() -> bool:
    return int(get_tensor_model_parallel_rank()) == 0
