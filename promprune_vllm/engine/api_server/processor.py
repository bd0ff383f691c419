"""The API server's side: how many tokens each image keeps, decided once and given to three readers.

The plan ``(seen, kept)`` of every image is made from sizes and settings before anything else happens, and feeds
the cache key, the placeholder's length, and the field the encoder reads. An image that keeps all its tokens has
vLLM's own cache key, so it shares the entry of a request without a budget.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, ImageEmbeddingItems

from promprune_vllm.config import Settings, environment
from promprune_vllm.core.budget import FIELD, METHOD_FIELD, BudgetRequest, shown
from promprune_vllm.core.features import Need
from promprune_vllm.core.registry import Selector, methods
from promprune_vllm.engine import families, patches
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
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.api_server.request_fields import PruningFields
from promprune_vllm.engine.compat import older_minors, versions
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.keys import COUNTS, PLAN, PROFILE, SUMMARY, TEXT
from promprune_vllm.errors import BudgetError, SettingsError

_PROFILING = object()
"""Value of the option ``PROFILE``: nothing that a client could send."""
_KEY_PREFIX = "promprune-"

versions.require_names(versions.PROCESSOR_NAMES)
patches.install(Stage.PROCESSOR)


@functools.lru_cache(maxsize=8)
def _chosen(
    _: tuple[tuple[str, str], ...], calibrated: str
) -> tuple[Settings, tuple[Selector, ...], tuple[str, ...]]:
    """Return the settings of an environment with their methods and the methods' digests.

    Args:
        calibrated: Of ``families.calibration``, as JSON: what is remembered is found by it.

    vLLM makes a processor anew for every request with an image, so none of this may be done each time.
    """
    settings = Settings.from_environment()
    calibration = json.loads(calibrated)
    return (
        settings,
        tuple(settings.selector(calibration, method) for method in settings.allowed),
        tuple(settings.digest(calibration, method) for method in settings.allowed),
    )


class PrunedProcessorMixin:
    """Goes before vLLM's processor class in a family's bases.

    A family defines ``_image_tokens(images, index, kwargs)``, how many tokens vLLM makes of an image, and
    ``boxes(width, height)``, where on it each of them looks; and may override ``_embedded_tokens``.
    """

    supplies: ClassVar[Need]
    """What the family's model can capture for a method; the text is there for every family."""

    def __init__(self, info: Any, dummy_inputs: Any, **options: Any) -> None:
        super().__init__(info, dummy_inputs, **options)  # type: ignore[call-arg]
        calibration = families.calibration(self.info.ctx.model_config)  # type: ignore[attr-defined]
        calibrated = json.dumps({name: dict(options) for name, options in calibration.items()}, sort_keys=True)
        self._settings, self._methods, self._digests = _chosen(environment(), calibrated)
        self._policy = self._settings.policy()
        self.refusal: str | None = None
        """Why this server cannot prune at all; then every image keeps its tokens."""
        for method in self._methods:
            self._require_supplied(method)

    def _require_supplied(self, method: Selector) -> None:
        supplied = self.supplies | Need.TEXT
        missing = method.needs & ~supplied
        if missing:
            names = ", ".join(need.name or "" for need in missing)
            able = [name for name, each in methods().items() if not each.needs & ~supplied]
            raise SettingsError(
                f"Method {method.name!r} needs {names}, which cannot be captured from "
                f"{self.info.ctx.model_config.architecture}. "  # type: ignore[attr-defined]
                f"Methods for this model: {', '.join(able)}."
            )

    @property
    def honours_detail(self) -> bool:
        """Whether OpenAI's ``detail`` of an image counts on this server."""
        return self._settings.detail

    @property
    def reads_text(self) -> bool:
        """Whether any method here looks at the user's text."""
        return any(Need.TEXT in method.needs for method in self._methods)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt; see ``BaseMultiModalProcessor.apply``."""
        with refusing(self.info.ctx.model_config):  # type: ignore[attr-defined]
            asked, kwargs = PruningFields.taken_from(inputs.hf_processor_mm_kwargs)
            profiling = kwargs.pop(PROFILE, None) is _PROFILING
            images = self._images(inputs)
            prunes = not (profiling or self.refusal)
            plans = self._plan(inputs, images, PruningFields() if profiling else asked, kwargs, prunes=prunes)
            named = images.named if isinstance(images, Images) else {}
            plan = Plan(plans, cached=(False,) * len(plans), named=named)
            planned = replace(inputs, hf_processor_mm_kwargs={**kwargs, PLAN: plan})
            result = super().apply(planned, timing_ctx)  # type: ignore[misc]
            if isinstance(images, Images):
                lengths = [place.length for place in result["mm_placeholders"].get("image", ())]
                plans = images.settled(plans, lengths)
                images.remember(plan.cached)
            if plans:
                method = self._methods[self._method_index(asked.method)].name
                form = None if asked.budget is None else asked.ask().form
                result[SUMMARY] = Summary(plans, plan.cached, method, form)
        return result

    def _images(self, inputs: Any) -> Any:
        """Return a prompt's images: ``Images``, what came encoded as vLLM has it, or ``None``."""
        items = inputs.mm_data_items.get("image")
        if items is None or isinstance(items, (ImageEmbeddingItems, DictEmbeddingItems)):
            return items
        return Images(items, (inputs.mm_uuid_items or {}).get("image"), older_minors.processor_cache(self, inputs))

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs of vLLM's memory profile: the most that requests can bring, so never pruned."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, PROFILE: _PROFILING})

    def _plan(
        self, inputs: Any, images: Any, asked: PruningFields, kwargs: Mapping[str, object], *, prunes: bool = True
    ) -> tuple[ImagePlan, ...]:
        ask, method = asked.ask(), self._method_index(asked.method)
        if images is None:
            ask.check_images(0)
            return ()
        if not isinstance(images, Images):
            if asked.explicit:
                raise BudgetError(
                    f"{FIELD} cannot be applied to image_embeds: they are already encoded. Send the image "
                    f"itself, or leave {FIELD} out.",
                    reason="unsupported",
                )
            rows = [self._embedded_tokens(images, i) for i in range(images.get_count())]
            return tuple(ImagePlan(count, count) for count in rows)
        counts = self._counts(images, asked, kwargs, prunes=prunes)
        text = self._text(inputs, asked) if Need.TEXT in self._methods[method].needs else ()
        return tuple(
            ImagePlan(seen, kept, method, text, size) if kept < seen else ImagePlan(seen, seen, size=size)
            for (seen, kept), size in zip(counts, images.sizes, strict=True)
        )

    def count(self, images: Any, asked: PruningFields) -> list[tuple[int, int]]:
        """Return tokens seen and kept of images of which only the sizes are known.

        Args:
            images: Answers ``get_count()``, ``get_image_size(index)`` and ``sizes``.
            asked: What a request with these images would ask for.

        Raises:
            BudgetError: As for such a request.
        """
        counts: list[int] = [self._image_tokens(images, i, {}) for i in range(images.get_count())]  # type: ignore[attr-defined]
        ask = asked.in_detail(asked.ask(), len(counts), self._policy)
        kept = self._kept(counts, ask, [self.current_level()] * len(counts))
        self._check_kept(images, kept, {})
        return kept

    def _counts(
        self, images: Images, asked: PruningFields, kwargs: Mapping[str, object], *, prunes: bool
    ) -> list[tuple[int, int]]:
        """Return tokens seen and kept; 1 and 1 of an image that keeps as many as vLLM's cache has of it."""
        counts = [
            1 if size is None else self._image_tokens(images, i, kwargs)  # type: ignore[attr-defined]
            for i, size in enumerate(images.sizes)
        ]
        if not prunes:
            return [(count, count) for count in counts]
        ask = asked.in_detail(asked.ask(), len(counts), self._policy)
        looks = self._settings.adapt_to_content
        kept = self._kept(counts, ask, images.decide(ask, self._policy, self.current_level(), looks=looks))
        self._check_kept(images, kept, kwargs)
        return kept

    def _kept(
        self, counts: Sequence[int], ask: BudgetRequest, levels: Sequence[Fraction]
    ) -> list[tuple[int, int]]:
        if self.refusal:
            return [(count, count) for count in counts]
        return list(zip(counts, self._policy.resolve_all(ask, counts, levels), strict=True))

    def _check_kept(self, images: Any, counts: Sequence[tuple[int, int]], kwargs: Mapping[str, object]) -> None:
        """Raise ``BudgetError`` where a family cannot keep so few tokens of these images."""

    def current_level(self) -> Fraction:
        """Return the share of the default that an image keeps at the moment, whatever is on it."""
        return current_level()

    def check_method(self, name: object) -> None:
        """Raise ``BudgetError`` unless a request may choose this method; ``None`` is the server's own."""
        self._method_index(name)

    def _method_index(self, name: object) -> int:
        allowed = self._settings.allowed
        if name is None:
            return 0
        if not isinstance(name, str) or name not in allowed:
            raise BudgetError(
                f"{METHOD_FIELD} must be one of {', '.join(allowed)}, got {shown(name)}. The server's "
                "operator allows more with --visual-token-allow-methods.",
                param=METHOD_FIELD,
                reason="method",
            )
        return allowed.index(name)

    def _text(self, inputs: Any, asked: PruningFields) -> tuple[int, ...]:
        """Return the tokens of the user's text: as the request tells, else of the prompt without its markers."""
        tokenizer: Any = self.info.get_tokenizer()  # type: ignore[attr-defined]
        text = inputs.prompt if asked.text is None else asked.text
        ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else list(text)
        special = set(tokenizer.all_special_ids)
        return tuple(token for token in ids if token not in special)[-MAX_TEXT_TOKENS:]

    def _embedded_tokens(self, images: Any, index: int) -> int:
        """How many tokens an image has that came as ``image_embeds``."""
        return int(images.get_feature_size(index))

    def _get_mm_hashes(self, inputs: Any) -> Any:
        plan, kwargs = split(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))  # type: ignore[misc]
        if "image" in hashes:
            pairs = zip(hashes["image"], plan.images, strict=True)
            hashes["image"] = [self._cache_key(key, image) for key, image in pairs]
            require_cached(plan, hashes["image"], older_minors.processor_cache(self, inputs))
        return hashes

    def _cache_key(self, key: str, image: ImagePlan) -> str:
        """Return an image's identity in every cache: vLLM's own unless tokens are dropped."""
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm  # type: ignore[attr-defined]
        if image.kept == image.seen:
            # A client's uuid may be any string; one that imitates a pruned image's key is hashed away.
            imitates = key.startswith(_KEY_PREFIX)
            return MultiModalHasher.hash_kwargs(algorithm, key=key) if imitates else key
        # Tokens before pruning are part of it: two images under one uuid must not be taken for each other.
        counts = {"seen": image.seen, "kept": image.kept}
        chosen = {"setting": self._digests[image.method], "text": list(image.text), **counts}
        return f"{_KEY_PREFIX}{MultiModalHasher.hash_kwargs(algorithm, key=key, **chosen)}"

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        plan, kwargs = split(inputs.hf_processor_mm_kwargs)
        rest = super()._get_cache_missing_processor_kwargs(  # type: ignore[misc]
            replace(inputs, hf_processor_mm_kwargs=kwargs), mm_is_cached
        )
        plan.cached = tuple(mm_is_cached.get("image", ()))
        missing = tuple(image for image, hit in zip(plan.images, plan.cached, strict=True) if not hit)
        return {**rest, PLAN: Plan(missing)}

    def _apply_hf_processor_main(self, mm_items: Any, *args: Any, **named: Any) -> Any:
        (hf_kwargs,) = (*args, *named.values())  # by whatever name: it is another one before vLLM 0.31
        plan, kwargs = split(hf_kwargs)
        output = super()._apply_hf_processor_main(mm_items, kwargs)  # type: ignore[misc]
        if plan.images:
            counts = [[image.seen, image.kept, image.method] for image in plan.images]
            output[COUNTS] = torch.tensor(counts)  # (images, 3)
            output[TEXT] = [torch.tensor(image.text, dtype=torch.int64) for image in plan.images]
        return output

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        _, kwargs = split(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, kwargs))  # type: ignore[misc]
        fields[COUNTS] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        fields[TEXT] = MultiModalFieldConfig.batched("image")
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        plan, kwargs = split(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [shortened(update, plan.images) if update.modality == "image" else update for update in updates]
