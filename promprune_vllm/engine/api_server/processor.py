"""Applies the policy in the API server: how many tokens each image and video keeps, decided once for three uses.

The plan ``(total, kept)`` of every image is made first, from sizes and settings. It determines the cache key, the
length of the placeholder, and the counts that the encoder reads. An image that keeps all its tokens has vLLM's own
cache key, so it shares the entry of a request without a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from vllm.multimodal.inputs import MultiModalKwargsItems

from promprune_vllm.core.budget import FIELD, IMAGE, VIDEO, BudgetRequest
from promprune_vllm.core.features import OF_TOWER, Need
from promprune_vllm.core.policy import Medium
from promprune_vllm.engine import patches
from promprune_vllm.engine.api_server import placeholders
from promprune_vllm.engine.api_server.all_media import (
    AllMedia,
    Counted,
    EncodedMedia,
    Place,
    is_encoded,
    order_in_prompt,
    order_of_ranges,
)
from promprune_vllm.engine.api_server.load_monitor import current_level
from promprune_vllm.engine.api_server.named_images import PromptImages, PromptMedia
from promprune_vllm.engine.api_server.planned_fields import PlannedFieldsMixin
from promprune_vllm.engine.api_server.prompt_videos import PromptVideos, VideoShape
from promprune_vllm.engine.api_server.pruning_plan import (
    MAX_TEXT_TOKENS,
    ImagePlan,
    Plan,
    ProcessedVideos,
    Summary,
    Targeted,
    identity,
)
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.api_server.retry_plan import plan_retry
from promprune_vllm.engine.api_server.seen_frames import SeenFrames
from promprune_vllm.engine.api_server.target_levels import find_targeted
from promprune_vllm.engine.compat import feature_cache, older_minors, parts, seams
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.keys import PLAN, PROFILE, SUMMARY
from promprune_vllm.errors import BudgetError

_PROFILING = object()
"""Value of the option ``PROFILE``: an object, which no client can send."""

seams.require(parts.PROCESSOR)
patches.install(Stage.PROCESSOR)


class PrunedProcessorMixin(PlannedFieldsMixin):
    """Goes before vLLM's processor class in a family's bases; the family implements ``ProcessorFamily``."""

    supplies = Need.PROJECTED | OF_TOWER

    def __init__(self, info: Any, dummy_inputs: Any, **options: Any) -> None:
        super().__init__(info, dummy_inputs, **options)
        self._methods.require_supplied(self.supplies | Need.TEXT, self.info.ctx.model_config.architecture)
        self._settings = self._methods.settings
        self._policy, self.agreement = self._settings.media_policy(), self._settings.agreement()
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
            prunes = not (profiling or self.unsupported_reason)
            bare = replace(inputs, hf_processor_mm_kwargs=kwargs)
            plan = self._hashed(bare) if prunes else Plan()
            media = self._media(bare, plan)
            plan.media = self._plan(bare, media, PruningRequest() if profiling else request, plan, prunes=prunes)
            plan.cached = {kind: (False,) * len(plans) for kind, plans in plan.media.items()}
            plan.named_uuids = {kind: each.named_uuids for kind, each in media.items()}
            result = super().apply(replace(inputs, hf_processor_mm_kwargs={**kwargs, PLAN: plan}), timing_ctx)
            if plan.media:
                result[SUMMARY] = self._summary(request, media, plan, result["mm_placeholders"])
        return result

    def _hashed(self, inputs: Any) -> Plan:
        """Return a plan with vLLM's cache keys and our identities, if anything needs them before vLLM does."""
        plan = Plan()
        stores = bool(feature_cache.capacity_bytes(self._settings))
        items = {kind: inputs.mm_data_items.get(kind) for kind in self.kinds}
        kinds = [kind for kind, each in items.items() if each is not None and not is_encoded(each)]
        if VIDEO in kinds or (stores and kinds):
            plan.hashes = self._get_mm_hashes(inputs)
        if stores:
            plan.identities = {kind: [identity(key) for key in plan.hashes[kind]] for kind in kinds}
        return plan

    def _media(self, inputs: Any, plan: Plan) -> dict[str, PromptMedia]:
        """Return a prompt's images and videos by kind."""
        cache = older_minors.processor_cache(self, inputs)
        media: dict[str, PromptMedia] = {}
        for kind in self.kinds:
            items, uuids = inputs.mm_data_items.get(kind), (inputs.mm_uuid_items or {}).get(kind)
            if items is None:
                continue
            if is_encoded(items):
                media[kind] = EncodedMedia(items, None, None)
            elif kind == IMAGE:
                media[kind] = PromptImages(items, uuids, cache)
            else:
                media[kind] = PromptVideos(items, uuids, cache, plan.hashes.get(kind, ()))
        return media

    def _summary(
        self, request: PruningRequest, media: Mapping[str, PromptMedia], plan: Plan, ranges: Mapping[str, Any]
    ) -> Summary:
        plans: dict[str, Sequence[ImagePlan]] = {}
        for kind, each in media.items():
            lengths = [place.get_num_embeds() for place in ranges.get(kind, ())]
            plans[kind] = each.final_plans(plan.media[kind], lengths)
            each.remember(plan.cached[kind])
        order = order_of_ranges({kind: ranges.get(kind, ()) for kind in media})
        images = tuple(plans[kind][i] for kind, i in order)
        cached = tuple(plan.cached[kind][i] for kind, i in order)
        method = self._methods.selectors[self._methods.index(request.method)].name
        form = request.budget.form if request.sent else None
        retry = plan_retry(self._settings, request, images, order)
        targeted = None if any(each.kept < each.total for each in plans.get(VIDEO, ())) else plan.targeted
        return Summary(images, cached, method, form, retry, targeted)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs of vLLM's profiling run. It needs the worst case, so they are never pruned."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, PROFILE: _PROFILING})

    def _plan(
        self, inputs: Any, media: Mapping[str, PromptMedia], request: PruningRequest, plan: Plan, *, prunes: bool
    ) -> dict[str, tuple[ImagePlan, ...]]:
        method = self._methods.index(request.method)
        every = AllMedia(media, self._order(inputs, media, request))
        budget = request.with_details(every.kinds, self._policy.images)
        budget.check_media(every.kinds)
        if prunes and request.sent:
            every.refuse_encoded()
        levels: list[Fraction] = []
        if prunes:
            levels, plan.targeted = self._levels(request, every, budget, inputs.hf_processor_mm_kwargs)
        text = self._text(inputs, request) if Need.TEXT in self._methods.selectors[method].needs else ()

        def plans() -> dict[str, tuple[ImagePlan, ...]]:
            kwargs = inputs.hf_processor_mm_kwargs
            totals = every.count(lambda images, i: self.image_tokens(images, i, kwargs))
            all_kept = not prunes or request.unpruned
            counts = totals if all_kept else self._kept(every, totals, budget, levels, kwargs)
            each = zip(every.kinds, every.sizes, every.pixels, totals, counts, strict=True)
            return every.by_kind(
                ImagePlan(total, kept, size=pixels, kind=kind)
                if kept == total
                else ImagePlan(
                    *(total, kept, method, text, pixels, kind),
                    between=self._methods.text_between(method, kind, size, kept),
                )
                for kind, size, pixels, total, kept in each
            )

        videos = media.get(VIDEO)
        if not prunes or not isinstance(videos, PromptVideos):
            return plans()
        self._process_videos(inputs, videos, videos.to_process, plan)
        planned = plans()
        keys = map(self._cache_key, plan.hashes[VIDEO], planned[VIDEO])
        changed = videos.unsure([*keys], older_minors.processor_cache(self, inputs))
        self._process_videos(inputs, videos, changed, plan)
        return plans() if changed else planned

    def _levels(
        self, request: PruningRequest, every: AllMedia, budget: BudgetRequest, kwargs: Mapping[str, object]
    ) -> tuple[list[Fraction], Targeted | None]:
        """Return the share of the default that ``"auto"`` keeps of each, and the target if it alone decides."""
        now = dict.fromkeys((IMAGE, VIDEO), self.current_level())
        if targeted := find_targeted(self, request, every.images, kwargs):
            now[IMAGE] *= targeted.share
        levels = every.decide_levels(budget, self._policy, now, adapts=self._settings.adapt_to_content)
        alone = targeted and targeted.decides(request, budget, every.by_kind(levels)[IMAGE])
        return levels, targeted if alone else None

    def _order(self, inputs: Any, media: Mapping[str, PromptMedia], request: PruningRequest) -> Sequence[Place]:
        """Return the images and videos in order of appearance, or in any if a budget does not depend on it."""
        counts = {kind: each.get_count() for kind, each in media.items()}
        if len(counts) < 2 or not isinstance(request.budget.each, tuple):
            return [(kind, i) for kind, count in counts.items() for i in range(count)]
        texts = {kind: self.dummy_inputs.get_dummy_text({kind: 1}) for kind in counts}
        decode = self.info.get_tokenizer().decode
        order = request.order or order_in_prompt(inputs.prompt, counts, texts, decode)
        if order is None:
            raise BudgetError(
                f"{FIELD} is a list, but the prompt does not tell the order of its images and videos: where they "
                f"are must stand {' and '.join(map(repr, texts.values()))}. Send one value for all of them.",
                reason="unsupported",
            )
        return order

    def _process_videos(self, inputs: Any, videos: PromptVideos, indices: Sequence[int], plan: Plan) -> None:
        """Process some of the videos, to learn their shapes; see ``prompt_videos``."""
        if not indices:
            return
        have = {kind: [True] * items.get_count() for kind, items in inputs.mm_data_items.items()}
        have[VIDEO] = [i not in indices for i in range(len(have[VIDEO]))]
        kwargs = self._get_cache_missing_processor_kwargs(inputs, have)
        data = {VIDEO: [inputs.mm_data_items[VIDEO][i] for i in indices]}
        items = self.info.parse_mm_data(data, validate=False)
        output = self._apply_hf_processor_main(items, kwargs)
        made = MultiModalKwargsItems.from_hf_inputs(output, self._get_mm_fields_config(output, kwargs))
        updates = [each for each in self._get_prompt_updates(items, kwargs, made) if each.modality == VIDEO]
        for n, i in enumerate(indices):
            shape = self.video_shape(made[VIDEO][n], placeholders.visual_tokens(updates[0], n))
            videos.learn(i, shape._replace(between=placeholders.text_between(updates[0], n)))
        plan.processed = ProcessedVideos(tuple(indices), output)

    def count(self, images: Any, request: PruningRequest) -> list[tuple[int, int]]:
        """Return the total and kept tokens of images, or raise the ``BudgetError`` that a request with them would.

        Args:
            images: Has ``get_count()``, ``get_image_size(index)`` and ``sizes``.
            request: The budget and method to count for.
        """
        every = AllMedia({IMAGE: images}, [(IMAGE, i) for i in range(images.get_count())])
        totals = every.count(lambda images, i: self.image_tokens(images, i, {}))
        budget = request.with_details(every.kinds, self._policy.images)
        targeted = find_targeted(self, request, images, {})
        levels = [self.current_level() * (targeted.share if targeted else 1)] * len(totals)
        counts = list(zip(totals, self._kept(every, totals, budget, levels, {}), strict=True))
        if any(kept < total for total, kept in counts):  # refuses methods for videos
            self._methods.text_between(self._methods.index(request.method), IMAGE, None, 1)
        return counts

    def _kept(
        self,
        every: AllMedia,
        totals: Sequence[int],
        budget: BudgetRequest,
        levels: Sequence[Fraction],
        kwargs: Mapping[str, object],
    ) -> Sequence[int]:
        """Return how many tokens each keeps; raise ``BudgetError`` if the model cannot handle so few."""
        if self.unsupported_reason:
            return totals
        media = list(map(Medium, every.kinds, totals, levels, every.frames))
        kept = self._policy.resolve_all(budget, media)
        self.check_kept(list(map(Counted, every.kinds, every.sizes, totals, kept)), kwargs)
        return kept

    def video_shape(self, item: Any, total: int) -> VideoShape:
        """Return the shape of a video; see ``ProcessorFamily``."""
        raise NotImplementedError

    def seen_frames(self, item: Any) -> SeenFrames:
        """Return the frames of a video as the model gets them; see ``ProcessorFamily``."""
        raise NotImplementedError

    def check_kept(self, media: Sequence[Counted], kwargs: Mapping[str, object]) -> None:
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
