"""The mixin that makes vLLM's model classes prune: ``embed_multimodal`` returns K rows per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import IMAGE, VIDEO
from promprune_vllm.core.features import Need
from promprune_vllm.engine import families, patches
from promprune_vllm.engine.compat import feature_cache, parts, seams
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.families.contract import ModelBase
from promprune_vllm.engine.keys import COUNTS, IDENTITY, LAYOUT, TEXT_TOKENS, field_of
from promprune_vllm.engine.worker import fault_isolation, selection_trace
from promprune_vllm.engine.worker.adapters import without_adapters, wrapped_embeddings
from promprune_vllm.engine.worker.encode import embed_images, runs, sources
from promprune_vllm.engine.worker.encoded_image import EncodedImage, PruneJob
from promprune_vllm.engine.worker.encoder_graphs import log_cost
from promprune_vllm.engine.worker.feature_store import FeatureStore
from promprune_vllm.engine.worker.selected_tokens import select_tokens
from promprune_vllm.engine.worker.selection_metrics import SelectionMetrics
from promprune_vllm.engine.worker.selection_trace import Trace
from promprune_vllm.engine.worker.text_between import with_text_between
from promprune_vllm.kernels import ops
from promprune_vllm.metrics.recorder import recorder

seams.require(parts.WORKER)


class PrunedModelMixin(ModelBase):
    """Comes before vLLM's model class in a family's bases; the family implements ``ModelFamily``."""

    def __init_subclass__(cls) -> None:
        """Give a family's class the name of vLLM's, which vLLM looks up when it loads a drafter."""
        super().__init_subclass__()
        if issubclass(cls, torch.nn.Module):
            cls.__name__ = cls.__bases__[-1].__name__

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._settings = Settings.from_environment()
        calibration = families.calibration(vllm_config.model_config)
        self._methods = [self._settings.selector(calibration, method) for method in self._settings.allowed]
        self._encoder_tokens = int(vllm_config.scheduler_config.max_num_encoder_input_tokens)
        model, device = vllm_config.model_config, vllm_config.device_config.device
        self._metrics = SelectionMetrics(device, recorder(model.served_model_name)) if _is_first_rank() else None
        capacity = feature_cache.capacity_bytes(self._settings)
        self._store = FeatureStore(capacity) if capacity else None
        if self._metrics is not None:
            self._metrics.record_stored_bytes(0)
        self._several_ranks = vllm_config.parallel_config.tensor_parallel_size > 1
        self._tokens_found = 0
        self._no_rows = torch.empty((0, model.get_inputs_embeds_size()), dtype=model.dtype, device=device)
        patches.install(Stage.WORKER)
        patches.install(Stage.WORKER_V2 if vllm_config.use_v2_model_runner else Stage.WORKER_V1)
        log_cost(vllm_config.compilation_config)
        if device.type == "cpu":
            patches.install(Stage.WORKER_CPU)
        ops.warm_up(device)  # so that the first request need not

    def embed_unpruned(self, **inputs: Any) -> Any:
        """Encode as vLLM does: return every token of every image."""
        outputs = super().embed_multimodal(**inputs)
        if outputs is not None and len(outputs):  # happens first in vLLM's profiling run, before any request
            self._no_rows = outputs[0].new_empty((0, outputs[0].shape[-1]))
        return outputs

    def zeros(self, rows: int) -> Tensor:
        """Return ``(rows, W)`` zeros, as wide as the rows of ``embed_multimodal``."""
        return self._no_rows.new_zeros((rows, self._no_rows.shape[1]))

    def embed_multimodal(self, **inputs: Any) -> Any:
        """Encode a batch of images and return the rows that enter the language model, K of N per image.

        Args:
            inputs: vLLM's inputs of images or of videos, plus from our processor ``(B, 3)`` counts (total tokens,
                kept tokens, index of the method), the text, with the feature cache the identities, and the layouts
                of videos. Without counts, or if no image is pruned or stored, vLLM's own method is used.
        """
        kind = VIDEO if field_of(VIDEO, COUNTS) in inputs else IMAGE
        names = [field_of(kind, name) for name in (COUNTS, TEXT_TOKENS, IDENTITY, LAYOUT)]
        counts, texts, identities, layouts = (inputs.pop(name, None) for name in names)
        jobs = [] if counts is None else [self._job(row, texts, i) for i, row in enumerate(counts.tolist())]
        if layouts is not None:
            jobs = [replace(job, layout=each.tolist()) for job, each in zip(jobs, layouts, strict=True)]
        if self._store is not None and identities is not None:
            keys = [bytes(each) for each in identities.tolist()]
            jobs = [replace(job, key=(key, job.total)) for job, key in zip(jobs, keys, strict=True)]
        if all(job.total == job.kept and job.key is None for job in jobs):
            embeddings = self.embed_unpruned(**inputs)
            self.batch_done(jobs)
        else:
            embeddings = embed_images(self, inputs, jobs, self._encoder_tokens)
        return self.as_sent(embeddings)

    def batch_done(self, jobs: Sequence[PruneJob]) -> None:
        """Update the metrics after one call of the encoder, except in the profiling run."""
        if self._metrics is not None and jobs and fault_isolation.in_step():
            self._metrics.flush(sum(job.total for job in jobs) - self._tokens_found)
        self._tokens_found = 0

    def _job(self, counts: list[int], texts: Sequence[Tensor] | None, image: int) -> PruneJob:
        total, kept, method = counts
        selector = self._methods[method]
        wants_text = kept < total and texts is not None and Need.TEXT in selector.needs
        return PruneJob(total, kept, selector, texts[image] if wants_text and texts is not None else None)

    def encode(self, inputs: dict[str, Any], items: slice, jobs: Sequence[PruneJob]) -> list[EncodedImage]:
        """Encode some of the images and capture what their methods use, or get them from the store."""
        found = self._find(jobs)
        images = {i: image for i, image in enumerate(found) if image is not None}
        used = sources(jobs, found)
        missing = sorted({*used} - images.keys())
        for run in runs(missing):
            part = slice(items.start + run.start, items.start + run.stop)
            captured = self.capture(inputs, part, self._captured(jobs))
            images.update(zip(range(run.start, run.stop), captured, strict=True))
        self._count_found(jobs, missing)
        return [self._with_texts(images[i], job) for i, job in zip(used, jobs, strict=True)]

    def _with_texts(self, image: EncodedImage, job: PruneJob) -> EncodedImage:
        """Return an image with the texts of its request: what the method reads, and what is between frames."""
        embed = self.get_language_model().embed_input_ids
        with without_adapters(self._wrapped_embeddings):
            if job.text is not None:
                image = image.with_text(embed(job.text))
            return with_text_between(image, job.layout, embed) if job.layout else image

    @cached_property
    def _wrapped_embeddings(self) -> list[Any]:
        """Not known before the first batch: vLLM wraps them after it has made the model."""
        return wrapped_embeddings(self.get_language_model())

    def _find(self, jobs: Sequence[PruneJob]) -> list[EncodedImage | None]:
        """Return the images that the stores of all ranks have: where one rank encodes, all do."""
        store = self._store
        if store is None or all(job.key is None for job in jobs):
            return [None for _ in jobs]
        found = [None if job.key is None else store.get(job.key, job.needs) for job in jobs]
        return fault_isolation.agree(found) if self._several_ranks else found

    def _captured(self, jobs: Sequence[PruneJob]) -> Need:
        """Return what to capture: for images to store, what any allowed method may need of them later."""
        stores = any(job.key is not None for job in jobs)
        needs = Need.PROJECTED
        for method in self._methods if stores else [job.method for job in jobs]:
            needs |= method.needs
        return needs

    def _count_found(self, jobs: Sequence[PruneJob], missing: Sequence[int]) -> None:
        if self._metrics is not None and any(job.key is not None for job in jobs):
            self._metrics.count_lookups(len(jobs) - len(missing), len(missing))
        self._tokens_found += sum(job.total for i, job in enumerate(jobs) if i not in missing)

    def remember(self, image: EncodedImage, job: PruneJob) -> None:
        """Store an image whose rows are ready, if images are stored."""
        if self._store is not None and job.key is not None:
            self._store.put(job.key, image)
            self._record_store()

    def forget(self, job: PruneJob) -> None:
        """Remove an image that failed from those stored."""
        if self._store is not None and job.key is not None:
            self._store.remove(job.key)
            self._record_store()

    def forget_images(self) -> None:
        """Remove all stored images: the encoder's weights may have changed."""
        if self._store is not None:
            self._store.clear()
            self._record_store()

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights as vLLM does, at the start or later, as reinforcement learning does."""
        loaded = super().load_weights(*args, **kwargs)
        self.forget_images()
        return loaded

    def stored_images(self) -> tuple[int, int, int] | None:
        """Return the number of stored images, their bytes and the capacity; ``None`` without a feature cache."""
        store = self._store
        return None if store is None else (len(store), store.bytes, store.capacity_bytes)

    def _record_store(self) -> None:
        if self._metrics is not None and self._store is not None:
            self._metrics.record_stored_bytes(self._store.bytes)

    def mark_kept(self, rows: Tensor, image: EncodedImage, positions: Tensor) -> Tensor:  # noqa: ARG002
        """Mark the kept rows of one image with their positions, where these do not follow from the order of rows.

        Args:
            rows: ``(K, W)``.
            image: The image that the rows belong to.
            positions: ``(K,)`` int64, positions of the rows among the image's N tokens.
        """
        return rows

    def as_sent(self, embeddings: Any) -> Any:
        """Return a batch's embeddings in the shape in which engines exchange them."""
        return embeddings

    def select(self, image: EncodedImage, job: PruneJob) -> Callable[[], Tensor]:
        """Select an image's tokens, and return a function that assembles their ``(rows, W)``.

        There are two steps because only the second may communicate between ranks, see ``fault_isolation.Step``.
        """
        if len(image.rows) != job.total:
            raise RuntimeError(
                f"the encoder returned {len(image.rows)} tokens, but the processor counted {job.total}"
            )
        if job.kept == job.total:
            # A copy, where the encoder's other rows, which are stored, would stay in memory with them.
            return image.rows.clone if job.key is not None else lambda: image.rows
        method = job.method.name
        with self._measure_time(method, "choose") as selection_marks:
            selected = select_tokens(image, job.kept, job.method)
        if self._metrics is not None:
            self._metrics.record_reports(method, selected)

        def assemble() -> Tensor:
            with self._measure_time(method, "assemble") as assembly_marks:
                rows, positions = selected.rows(self.project)
                marked = self.mark_kept(rows, image, positions)
            if self._metrics is not None and self._settings.inspector:
                selection_trace.attach_trace(
                    marked, Trace.of(job.method, selected, [selection_marks, assembly_marks])
                )
            return marked

        return assemble

    def _measure_time(self, method: str, stage: str) -> AbstractContextManager[list[Any]]:
        return nullcontext([]) if self._metrics is None else self._metrics.measure_time(method, stage)


def _is_first_rank() -> bool:
    return int(get_tensor_model_parallel_rank()) == 0
