"""Applies the policy in the API server: how many tokens each image keeps, decided once for three uses.

The plan ``(total, kept)`` of every image is made first, from sizes and settings. It determines the cache key, the
length of the placeholder, and the counts that the encoder reads. An image that keeps all its tokens has vLLM's own
cache key, so it shares the entry of a request without a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, ImageEmbeddingItems

from promprune_vllm.core.budget import FIELD, BudgetRequest
from promprune_vllm.core.features import OF_TOWER, Need
from promprune_vllm.engine import patches
from promprune_vllm.engine.api_server import placeholders
from promprune_vllm.engine.api_server.allowed_methods import AllowedMethods
from promprune_vllm.engine.api_server.load_monitor import current_level
from promprune_vllm.engine.api_server.named_images import PromptImages, require_cached
from promprune_vllm.engine.api_server.pruning_plan import (
    MAX_TEXT_TOKENS,
    ImagePlan,
    Plan,
    Summary,
    identity,
    split_plan,
)
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.api_server.retry_plan import plan_retry
from promprune_vllm.engine.compat import feature_cache, older_minors, parts, seams
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.families.contract import ProcessorBase
from promprune_vllm.engine.keys import COUNTS, IDENTITY, PLAN, PROFILE, SUMMARY, TEXT_TOKENS
from promprune_vllm.errors import BudgetError

_PROFILING = object()
"""Value of the option ``PROFILE``: an object, which no client can send."""
_KEY_PREFIX = "promprune-"

seams.require(parts.PROCESSOR)
patches.install(Stage.PROCESSOR)


class PrunedProcessorMixin(ProcessorBase):
    """Goes before vLLM's processor class in a family's bases; the family implements ``ProcessorFamily``."""

    modality = "image"
    supplies = Need.PROJECTED | OF_TOWER

    def __init__(self, info: Any, dummy_inputs: Any, **options: Any) -> None:
        super().__init__(info, dummy_inputs, **options)
        model_config = self.info.ctx.model_config
        self._methods = AllowedMethods.of(model_config)
        self._methods.require_supplied(self.supplies | Need.TEXT, model_config.architecture)
        self._settings = self._methods.settings
        self._policy = self._settings.policy()
        self.unsupported_reason: str | None = None
        """Why this server cannot prune at all; then every image keeps all its tokens."""

    @property
    def honors_detail(self) -> bool:
        """Whether this server honors OpenAI's ``detail`` of an image."""
        return self._settings.detail

    @property
    def reads_text(self) -> bool:
        """Whether any allowed method uses the user's text."""
        return self._methods.needs_text()

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt; see ``BaseMultiModalProcessor.apply``."""
        with refusing(self.info.ctx.model_config):
            request, kwargs = PruningRequest.split_options(inputs.hf_processor_mm_kwargs)
            profiling = kwargs.pop(PROFILE, None) is _PROFILING
            images = self._images(inputs)
            prunes = not (profiling or self.unsupported_reason)
            plans = self._plan(inputs, images, PruningRequest() if profiling else request, kwargs, prunes=prunes)
            named_uuids = images.named_uuids if isinstance(images, PromptImages) else {}
            plan = Plan(plans, cached=(False,) * len(plans), named_uuids=named_uuids)
            if feature_cache.capacity_bytes(self._settings) and prunes and isinstance(images, PromptImages):
                self._identify(plan, replace(inputs, hf_processor_mm_kwargs=kwargs))
            inputs_with_plan = replace(inputs, hf_processor_mm_kwargs={**kwargs, PLAN: plan})
            result = super().apply(inputs_with_plan, timing_ctx)
            if isinstance(images, PromptImages):
                made = result["mm_placeholders"].get(self.modality, ())
                plans = images.final_plans(plans, [placeholder.get_num_embeds() for placeholder in made])
                images.remember(plan.cached)
            if plans:
                method = self._methods.selectors[self._methods.index(request.method)].name
                form = request.budget.form if request.sent else None
                retry = plan_retry(self._settings, request, plans)
                result[SUMMARY] = Summary(plans, plan.cached, method, form, self.modality, retry)
        return result

    def _identify(self, plan: Plan, inputs: Any) -> None:
        """Fill in the images' identities: without the processor cache, vLLM hashes images only at the end."""
        plan.hashes = super()._get_mm_hashes(inputs)
        plan.identities = [identity(key) for key in plan.hashes[self.modality]]

    def _images(self, inputs: Any) -> Any:
        """Return a prompt's images: ``PromptImages``, or vLLM's items for ``image_embeds``, or ``None``."""
        items = inputs.mm_data_items.get(self.modality)
        if items is None or isinstance(items, (ImageEmbeddingItems, DictEmbeddingItems)):
            return items
        uuids = (inputs.mm_uuid_items or {}).get(self.modality)
        return PromptImages(items, uuids, older_minors.processor_cache(self, inputs))

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs of vLLM's profiling run. It needs the worst case, so they are never pruned."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, PROFILE: _PROFILING})

    def _plan(
        self,
        inputs: Any,
        images: Any,
        request: PruningRequest,
        kwargs: Mapping[str, object],
        *,
        prunes: bool = True,
    ) -> tuple[ImagePlan, ...]:
        method = self._methods.index(request.method)
        if images is None:
            request.budget.check_images(0)
            return ()
        if not isinstance(images, PromptImages):
            if request.sent:
                raise BudgetError(
                    f"{FIELD} cannot be applied to image_embeds: they are already encoded. Send the image "
                    f"itself, or leave {FIELD} out.",
                    reason="unsupported",
                )
            totals = [self.embedded_tokens(images, i) for i in range(images.get_count())]
            return tuple(ImagePlan(total, total) for total in totals)
        counts = self._counts(images, request, kwargs, prunes=prunes)
        text = self._text(inputs, request) if Need.TEXT in self._methods.selectors[method].needs else ()
        return tuple(
            ImagePlan(total, kept, method, text, size) if kept < total else ImagePlan(total, total, size=size)
            for (total, kept), size in zip(counts, images.sizes, strict=True)
        )

    def count(self, images: Any, request: PruningRequest) -> list[tuple[int, int]]:
        """Return the total and kept tokens of images, given only their sizes.

        Args:
            images: Has ``get_count()``, ``get_image_size(index)`` and ``sizes``.
            request: The budget and method to count for.

        Raises:
            BudgetError: A request with these images would be refused.
        """
        counts = [self.image_tokens(images, i, {}) for i in range(images.get_count())]
        budget = request.with_details(len(counts), self._policy)
        kept = self._kept(counts, budget, [self.current_level()] * len(counts))
        self.check_kept(images, kept, {})
        return kept

    def _counts(
        self, images: PromptImages, request: PruningRequest, kwargs: Mapping[str, object], *, prunes: bool
    ) -> list[tuple[int, int]]:
        """Return total and kept tokens; ``(1, 1)`` for an unknown named image, which keeps all its tokens."""
        counts = [
            1 if size is None else self.image_tokens(images, i, kwargs) for i, size in enumerate(images.sizes)
        ]
        if not prunes:
            return [(count, count) for count in counts]
        budget = request.with_details(len(counts), self._policy)
        adapts = self._settings.adapt_to_content
        levels = images.decide_levels(budget, self._policy, self.current_level(), adapts=adapts)
        kept = self._kept(counts, budget, levels)
        self.check_kept(images, kept, kwargs)
        return kept

    def _kept(
        self, counts: Sequence[int], budget: BudgetRequest, levels: Sequence[Fraction]
    ) -> list[tuple[int, int]]:
        if self.unsupported_reason:
            return [(count, count) for count in counts]
        return list(zip(counts, self._policy.resolve_all(budget, counts, levels), strict=True))

    def check_kept(self, images: Any, counts: Sequence[tuple[int, int]], kwargs: Mapping[str, object]) -> None:
        """Accept any number of kept tokens by default; see ``ProcessorFamily``."""

    def current_level(self) -> Fraction:
        """Return the share of the default that an image keeps now, regardless of its content."""
        return current_level()

    def check_method(self, name: object) -> None:
        """Raise ``BudgetError`` unless requests may name this method; ``None`` is the server's default."""
        self._methods.index(name)

    def _text(self, inputs: Any, request: PruningRequest) -> tuple[int, ...]:
        """Return the tokens of the request's text, or else of the prompt, without special tokens."""
        tokenizer: Any = self.info.get_tokenizer()
        text = inputs.prompt if request.text is None else request.text
        ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else list(text)
        special = set(tokenizer.all_special_ids)
        return tuple(token for token in ids if token not in special)[-MAX_TEXT_TOKENS:]

    def image_options(self, kwargs: Mapping[str, object]) -> dict[str, Any]:
        """Return the options of the server and of a request that apply to images, as transformers reads them."""
        merged: dict[str, Any] = self.info.ctx.get_merged_mm_kwargs(kwargs)
        return {**merged, **(merged.get("images_kwargs") or {})}

    def embedded_tokens(self, images: Any, index: int) -> int:
        """Return how many tokens an image sent as ``image_embeds`` has."""
        return int(images.get_feature_size(index))

    def _get_mm_hashes(self, inputs: Any) -> Any:
        plan, kwargs = split_plan(inputs.hf_processor_mm_kwargs)
        hashes = dict(plan.hashes) or super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))
        if self.modality in hashes:
            pairs = zip(hashes[self.modality], plan.images, strict=True)
            keys = hashes[self.modality] = [self._cache_key(key, image) for key, image in pairs]
            require_cached(plan, keys, older_minors.processor_cache(self, inputs))
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
        plan.cached = tuple(mm_is_cached.get(self.modality, ()))
        missing = [i for i, hit in enumerate(plan.cached) if not hit]
        identities = [plan.identities[i] for i in missing] if plan.identities else ()
        return {**rest, PLAN: Plan(tuple(plan.images[i] for i in missing), identities=identities)}

    def _apply_hf_processor_main(self, mm_items: Any, *args: Any, **named: Any) -> Any:
        (hf_kwargs,) = (*args, *named.values())  # vLLM 0.31 renamed this parameter
        plan, kwargs = split_plan(hf_kwargs)
        output = super()._apply_hf_processor_main(mm_items, kwargs)
        if plan.images:
            counts = [[image.total, image.kept, image.method] for image in plan.images]
            output[COUNTS] = torch.tensor(counts)  # (images, 3)
            output[TEXT_TOKENS] = [torch.tensor(image.text, dtype=torch.int64) for image in plan.images]
        if plan.identities:
            output[IDENTITY] = torch.tensor([list(each) for each in plan.identities], dtype=torch.uint8)
        return output

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        _, kwargs = split_plan(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, kwargs))
        fields[COUNTS] = MultiModalFieldConfig.batched(self.modality, keep_on_cpu=True)
        fields[TEXT_TOKENS] = MultiModalFieldConfig.batched(self.modality)
        fields[IDENTITY] = MultiModalFieldConfig.batched(self.modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        plan, kwargs = split_plan(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)
        counts = [item[COUNTS].data for item in out_mm_kwargs.get(self.modality, ())]
        return [
            placeholders.shorten(update, plan.images, counts) if update.modality == self.modality else update
            for update in updates
        ]
