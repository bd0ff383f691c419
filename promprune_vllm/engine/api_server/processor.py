"""The API server's side: how many tokens each image keeps, decided once and used in three places.

The plan ``(total, kept)`` of every image is made from sizes and settings before anything else happens. It decides
the cache key, the length of the placeholder, and the counts that the encoder reads. An image that keeps all its
tokens has vLLM's own cache key, so it shares the entry of a request without a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, ImageEmbeddingItems

from promprune_vllm.core.budget import FIELD, BudgetRequest
from promprune_vllm.core.features import Need
from promprune_vllm.engine import patches
from promprune_vllm.engine.api_server.allowed_methods import AllowedMethods
from promprune_vllm.engine.api_server.load_monitor import current_level
from promprune_vllm.engine.api_server.named_images import Images, require_cached
from promprune_vllm.engine.api_server.pruning_plan import (
    MAX_TEXT_TOKENS,
    ImagePlan,
    Plan,
    Summary,
    shortened,
    split,
)
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.compat import older_minors, versions
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.families.contract import ProcessorFamily, UpstreamProcessor
from promprune_vllm.engine.keys import COUNTS, PLAN, PROFILE, SUMMARY, TEXT
from promprune_vllm.errors import BudgetError

_PROFILING = object()
"""Value of the option ``PROFILE``: nothing that a client could send."""
_KEY_PREFIX = "promprune-"

versions.require_names(versions.PROCESSOR_NAMES)
patches.install(Stage.PROCESSOR)


if TYPE_CHECKING:

    class _Bases(ProcessorFamily, UpstreamProcessor):
        pass

else:
    _Bases = object  # see families.contract


class PrunedProcessorMixin(_Bases):
    """Goes before vLLM's processor class in a family's bases; the family implements ``ProcessorFamily``."""

    def __init__(self, info: Any, dummy_inputs: Any, **options: Any) -> None:
        super().__init__(info, dummy_inputs, **options)
        model_config = self.info.ctx.model_config
        self._methods = AllowedMethods.of(model_config)
        self._methods.require_supplied(self.supplies | Need.TEXT, model_config.architecture)
        self._settings = self._methods.settings
        self._policy = self._settings.policy()
        self.refusal: str | None = None
        """Why this server cannot prune at all; then every image keeps its tokens."""

    @property
    def honors_detail(self) -> bool:
        """Whether OpenAI's ``detail`` of an image counts on this server."""
        return self._settings.detail

    @property
    def reads_text(self) -> bool:
        """Whether any method here looks at the user's text."""
        return self._methods.needs_text()

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt; see ``BaseMultiModalProcessor.apply``."""
        with refusing(self.info.ctx.model_config):
            request, kwargs = PruningRequest.taken_from(inputs.hf_processor_mm_kwargs)
            profiling = kwargs.pop(PROFILE, None) is _PROFILING
            images = self._images(inputs)
            prunes = not (profiling or self.refusal)
            plans = self._plan(inputs, images, PruningRequest() if profiling else request, kwargs, prunes=prunes)
            named = images.named if isinstance(images, Images) else {}
            plan = Plan(plans, cached=(False,) * len(plans), named=named)
            planned = replace(inputs, hf_processor_mm_kwargs={**kwargs, PLAN: plan})
            result = super().apply(planned, timing_ctx)
            if isinstance(images, Images):
                lengths = [place.length for place in result["mm_placeholders"].get("image", ())]
                plans = images.settled(plans, lengths)
                images.remember(plan.cached)
            if plans:
                method = self._methods.selectors[self._methods.index(request.method)].name
                form = request.budget.form if request.sent else None
                result[SUMMARY] = Summary(plans, plan.cached, method, form)
        return result

    def _images(self, inputs: Any) -> Any:
        """Return a prompt's images: ``Images``, what came encoded as vLLM has it, or ``None``."""
        items = inputs.mm_data_items.get("image")
        if items is None or isinstance(items, (ImageEmbeddingItems, DictEmbeddingItems)):
            return items
        return Images(items, (inputs.mm_uuid_items or {}).get("image"), older_minors.processor_cache(self, inputs))

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs of vLLM's profiling run: the most that requests can bring, so never pruned."""
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
        if not isinstance(images, Images):
            if request.sent:
                raise BudgetError(
                    f"{FIELD} cannot be applied to image_embeds: they are already encoded. Send the image "
                    f"itself, or leave {FIELD} out.",
                    reason="unsupported",
                )
            rows = [self.embedded_tokens(images, i) for i in range(images.get_count())]
            return tuple(ImagePlan(count, count) for count in rows)
        counts = self._counts(images, request, kwargs, prunes=prunes)
        text = self._text(inputs, request) if Need.TEXT in self._methods.selectors[method].needs else ()
        return tuple(
            ImagePlan(total, kept, method, text, size) if kept < total else ImagePlan(total, total, size=size)
            for (total, kept), size in zip(counts, images.sizes, strict=True)
        )

    def count(self, images: Any, request: PruningRequest) -> list[tuple[int, int]]:
        """Return the total and kept tokens of images of which only the sizes are known.

        Args:
            images: Answers ``get_count()``, ``get_image_size(index)`` and ``sizes``.
            request: What a request with these images would ask for.

        Raises:
            BudgetError: As for such a request.
        """
        counts = [self.image_tokens(images, i, {}) for i in range(images.get_count())]
        budget = request.with_details(len(counts), self._policy)
        kept = self._kept(counts, budget, [self.current_level()] * len(counts))
        self.check_kept(images, kept, {})
        return kept

    def _counts(
        self, images: Images, request: PruningRequest, kwargs: Mapping[str, object], *, prunes: bool
    ) -> list[tuple[int, int]]:
        """Return total and kept tokens; 1 and 1 for an image that keeps as many as vLLM's cache has of it."""
        counts = [
            1 if size is None else self.image_tokens(images, i, kwargs) for i, size in enumerate(images.sizes)
        ]
        if not prunes:
            return [(count, count) for count in counts]
        budget = request.with_details(len(counts), self._policy)
        adapts = self._settings.adapt_to_content
        levels = images.decide(budget, self._policy, self.current_level(), adapts=adapts)
        kept = self._kept(counts, budget, levels)
        self.check_kept(images, kept, kwargs)
        return kept

    def _kept(
        self, counts: Sequence[int], budget: BudgetRequest, levels: Sequence[Fraction]
    ) -> list[tuple[int, int]]:
        if self.refusal:
            return [(count, count) for count in counts]
        return list(zip(counts, self._policy.resolve_all(budget, counts, levels), strict=True))

    def check_kept(self, images: Any, counts: Sequence[tuple[int, int]], kwargs: Mapping[str, object]) -> None:
        """Accept any number of kept tokens; see ``ProcessorFamily``."""

    def current_level(self) -> Fraction:
        """Return the share of the default that an image keeps at the moment, whatever is on it."""
        return current_level()

    def check_method(self, name: object) -> None:
        """Raise ``BudgetError`` unless a request may choose this method; ``None`` is the server's own."""
        self._methods.index(name)

    def _text(self, inputs: Any, request: PruningRequest) -> tuple[int, ...]:
        """Return the tokens of the user's text: the request's, else the prompt's without its special tokens."""
        tokenizer: Any = self.info.get_tokenizer()
        text = inputs.prompt if request.text is None else request.text
        ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else list(text)
        special = set(tokenizer.all_special_ids)
        return tuple(token for token in ids if token not in special)[-MAX_TEXT_TOKENS:]

    def embedded_tokens(self, images: Any, index: int) -> int:
        """Return how many tokens an image has that was sent as ``image_embeds``."""
        return int(images.get_feature_size(index))

    def _get_mm_hashes(self, inputs: Any) -> Any:
        plan, kwargs = split(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))
        if "image" in hashes:
            pairs = zip(hashes["image"], plan.images, strict=True)
            hashes["image"] = [self._cache_key(key, image) for key, image in pairs]
            require_cached(plan, hashes["image"], older_minors.processor_cache(self, inputs))
        return hashes

    def _cache_key(self, key: str, image: ImagePlan) -> str:
        """Return an image's identity in every cache: vLLM's own unless tokens are dropped."""
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        if image.kept == image.total:
            # A client's uuid may be any string; one that imitates a pruned image's key is hashed away.
            imitates = key.startswith(_KEY_PREFIX)
            return MultiModalHasher.hash_kwargs(algorithm, key=key) if imitates else key
        # Tokens before pruning are part of it: two images under one uuid must not be taken for each other.
        counts = {"seen": image.total, "kept": image.kept}
        selection = {"setting": self._methods.digests[image.method], "text": list(image.text), **counts}
        return f"{_KEY_PREFIX}{MultiModalHasher.hash_kwargs(algorithm, key=key, **selection)}"

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        plan, kwargs = split(inputs.hf_processor_mm_kwargs)
        rest = super()._get_cache_missing_processor_kwargs(
            replace(inputs, hf_processor_mm_kwargs=kwargs), mm_is_cached
        )
        plan.cached = tuple(mm_is_cached.get("image", ()))
        missing = tuple(image for image, hit in zip(plan.images, plan.cached, strict=True) if not hit)
        return {**rest, PLAN: Plan(missing)}

    def _apply_hf_processor_main(self, mm_items: Any, *args: Any, **named: Any) -> Any:
        (hf_kwargs,) = (*args, *named.values())  # by whatever name: it is another one before vLLM 0.31
        plan, kwargs = split(hf_kwargs)
        output = super()._apply_hf_processor_main(mm_items, kwargs)
        if plan.images:
            counts = [[image.total, image.kept, image.method] for image in plan.images]
            output[COUNTS] = torch.tensor(counts)  # (images, 3)
            output[TEXT] = [torch.tensor(image.text, dtype=torch.int64) for image in plan.images]
        return output

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        _, kwargs = split(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, kwargs))
        fields[COUNTS] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        fields[TEXT] = MultiModalFieldConfig.batched("image")
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        plan, kwargs = split(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)
        return [shortened(update, plan.images) if update.modality == "image" else update for update in updates]
