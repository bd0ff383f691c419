"""What vLLM's processing of a prompt does by the plan: cache keys, fields for the encoder, and placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems

from promprune_vllm.core.budget import IMAGE, VIDEO
from promprune_vllm.engine.api_server import placeholders
from promprune_vllm.engine.api_server.allowed_methods import AllowedMethods
from promprune_vllm.engine.api_server.named_images import require_cached
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan, split_plan
from promprune_vllm.engine.compat import older_minors
from promprune_vllm.engine.families.contract import ProcessorBase
from promprune_vllm.engine.keys import COUNTS, IDENTITY, LAYOUT, PLAN, TEXT_TOKENS, field_of

_KEY_PREFIX = "promprune-"


class PlannedFieldsMixin(ProcessorBase):
    """Obeys the ``Plan`` that the options of a processor call have; without one, does as vLLM does."""

    kinds: ClassVar[Sequence[str]] = (IMAGE,)

    def __init__(self, info: Any, dummy_inputs: Any, **options: Any) -> None:
        super().__init__(info, dummy_inputs, **options)
        self._methods = AllowedMethods.of(self.info.ctx.model_config)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        plan, kwargs = split_plan(inputs.hf_processor_mm_kwargs)
        hashes = dict(plan.hashes) or super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))
        for kind in set(plan.media).intersection(hashes):
            pairs = zip(hashes[kind], plan.media[kind], strict=True)
            keys = hashes[kind] = [self._cache_key(key, image) for key, image in pairs]
            require_cached(plan, kind, keys, older_minors.processor_cache(self, inputs))
        return hashes

    def _cache_key(self, key: str, image: ImagePlan) -> str:
        """Return an image's key in every cache: vLLM's own key unless tokens are dropped."""
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        if image.kept == image.total:
            # A client's uuid may be any string; one that looks like a pruned image's key is hashed.
            is_imitation = key.startswith(_KEY_PREFIX)
            return MultiModalHasher.hash_kwargs(algorithm, key=key) if is_imitation else key
        # The total is part of the key, so that two images with the same uuid are not confused.
        counts = {"seen": image.total, "kept": image.kept}
        selection = {"setting": self._methods.digests[image.method], "text": list(image.text), **counts}
        return f"{_KEY_PREFIX}{MultiModalHasher.hash_kwargs(algorithm, key=key, **selection)}"

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        plan, kwargs = split_plan(inputs.hf_processor_mm_kwargs)
        rest = super()._get_cache_missing_processor_kwargs(
            replace(inputs, hf_processor_mm_kwargs=kwargs), mm_is_cached
        )
        plan.cached = {kind: tuple(mm_is_cached[kind]) for kind in plan.media}
        missing = {kind: [i for i, hit in enumerate(hits) if not hit] for kind, hits in plan.cached.items()}
        return {**rest, PLAN: plan.take(missing)}

    def _apply_hf_processor_main(self, mm_items: Any, *args: Any, **named: Any) -> Any:
        (hf_kwargs,) = (*args, *named.values())  # vLLM 0.31 renamed this parameter
        plan, kwargs = split_plan(hf_kwargs)
        # Without a cache, vLLM asks for all videos: also for those that keep all their tokens.
        if plan.processed is None or len(plan.processed.indices) != len(mm_items[VIDEO]):
            output = super()._apply_hf_processor_main(mm_items, kwargs)
        else:
            rest = MultiModalDataItems({kind: items for kind, items in mm_items.items() if kind != VIDEO})
            output = super()._apply_hf_processor_main(rest, kwargs)
            output.update(plan.processed.output)
        for kind, images in plan.media.items():
            if images:
                counts = [[image.total, image.kept, image.method] for image in images]
                output[field_of(kind, COUNTS)] = torch.tensor(counts)  # (images, 3)
                texts = [torch.tensor(image.text, dtype=torch.int64) for image in images]
                output[field_of(kind, TEXT_TOKENS)] = texts
            if images and kind == VIDEO:  # filled in with the placeholders, which are made of this output
                output[field_of(kind, LAYOUT)] = [torch.empty(0, dtype=torch.int64) for _ in images]
            if identities := plan.identities.get(kind):
                rows = torch.tensor([list(each) for each in identities], dtype=torch.uint8)
                output[field_of(kind, IDENTITY)] = rows
        return output

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        _, kwargs = split_plan(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, kwargs))
        for kind in self.kinds:
            fields[field_of(kind, COUNTS)] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
            fields[field_of(kind, TEXT_TOKENS)] = MultiModalFieldConfig.batched(kind)
            fields[field_of(kind, IDENTITY)] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        if VIDEO in self.kinds:
            fields[field_of(VIDEO, LAYOUT)] = MultiModalFieldConfig.batched(VIDEO, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        plan, kwargs = split_plan(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)
        return [
            placeholders.shorten(update, plan.media[update.modality], out_mm_kwargs.get(update.modality, ()))
            if update.modality in plan.media
            else update
            for update in updates
        ]
