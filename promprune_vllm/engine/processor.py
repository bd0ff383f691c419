"""The API server's side: how many tokens each image keeps, decided once and given to three readers.

The plan ``(seen, kept)`` of every image is made from sizes and settings before anything else happens, and feeds
the cache key, the placeholder's length, and the field the encoder reads. An image that keeps all its tokens has
vLLM's own cache key, so it shares the entry of a request without a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, ImageEmbeddingItems

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import FIELD, Budget, BudgetPolicy
from promprune_vllm.core.features import Need
from promprune_vllm.core.registry import methods
from promprune_vllm.engine import checks, families
from promprune_vllm.engine.request import SUMMARY, refusing
from promprune_vllm.errors import BudgetError, SettingsError

COUNTS = "visual_token_counts"
"""Field of every image: ``(2,)`` int64, tokens seen and kept. Read by ``PrunedModelMixin``."""
_PLAN = "_promprune_plan"
_KEY_PREFIX = "promprune-"

checks.require_names(checks.PROCESSOR_NAMES)


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What happens to one image: visual tokens before and after pruning."""

    seen: int
    kept: int


class PrunedProcessorMixin:
    """Goes before vLLM's processor class in a family's bases.

    A family defines ``_image_tokens(images, index, kwargs)``, how many tokens vLLM makes of an image, and may
    override ``_embedded_tokens``.
    """

    supplies: ClassVar[Need]
    """What the family's model can capture for a method."""

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)  # type: ignore[call-arg]
        settings = Settings.from_environment()
        self._require_supplied(settings)
        architectures = self.info.ctx.model_config.architectures  # type: ignore[attr-defined]
        self._digest = settings.digest(families.calibration(architectures))
        self._policy = BudgetPolicy()

    def _require_supplied(self, settings: Settings) -> None:
        missing = settings.selector().needs & ~self.supplies
        if missing:
            names = ", ".join(need.name or "" for need in missing)
            able = [name for name, method in methods().items() if not method.needs & ~self.supplies]
            raise SettingsError(
                f"Method {settings.method!r} needs {names}, which cannot be captured from "
                f"{self.info.ctx.model_config.architecture}. "  # type: ignore[attr-defined]
                f"Methods for this model: {', '.join(able)}."
            )

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt; see ``BaseMultiModalProcessor.apply``."""
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        asked = kwargs.pop(FIELD, None)
        plan = self._plan(inputs.mm_data_items, asked, kwargs)
        planned = replace(inputs, hf_processor_mm_kwargs={**kwargs, _PLAN: plan})
        result = super().apply(planned, timing_ctx)  # type: ignore[misc]
        if plan:
            result[SUMMARY] = plan
        return result

    def _plan(self, mm_items: Any, asked: object, kwargs: Mapping[str, object]) -> tuple[ImagePlan, ...]:
        with refusing():
            budget = None if asked is None else Budget.parse(asked)
            images = mm_items.get("image")
            if images is None:
                return ()
            return tuple(self._plan_image(images, i, budget, kwargs) for i in range(images.get_count()))

    def _plan_image(
        self, images: Any, index: int, budget: Budget | None, kwargs: Mapping[str, object]
    ) -> ImagePlan:
        if isinstance(images, (ImageEmbeddingItems, DictEmbeddingItems)):
            if budget is not None:
                raise BudgetError(
                    f"{FIELD} cannot be applied to image_embeds: they are already encoded. Send the image "
                    f"itself, or leave {FIELD} out."
                )
            size = self._embedded_tokens(images, index)
            return ImagePlan(size, size)
        seen = self._image_tokens(images, index, kwargs)  # type: ignore[attr-defined]
        return ImagePlan(seen, self._policy.resolve(budget, seen))

    def _embedded_tokens(self, images: Any, index: int) -> int:
        """How many tokens an image has that came as ``image_embeds``."""
        return int(images.get_feature_size(index))

    def _get_mm_hashes(self, inputs: Any) -> Any:
        plan, kwargs = _split(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))  # type: ignore[misc]
        if "image" in hashes:
            pairs = zip(hashes["image"], plan, strict=True)
            hashes["image"] = [self._cache_key(key, image) for key, image in pairs]
        return hashes

    def _cache_key(self, key: str, image: ImagePlan) -> str:
        """Return an image's identity in every cache: vLLM's own unless tokens are dropped."""
        if image.kept == image.seen and not key.startswith(_KEY_PREFIX):
            return key
        # A client's uuid may be any string; one that imitates a pruned image's key is hashed away as well.
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm  # type: ignore[attr-defined]
        digest = MultiModalHasher.hash_kwargs(algorithm, key=key, setting=self._digest, kept=image.kept)
        return f"{_KEY_PREFIX if image.kept < image.seen else ''}{digest}"

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        plan, kwargs = _split(inputs.hf_processor_mm_kwargs)
        rest = super()._get_cache_missing_processor_kwargs(  # type: ignore[misc]
            replace(inputs, hf_processor_mm_kwargs=kwargs), mm_is_cached
        )
        cached = mm_is_cached.get("image", ())
        missing = tuple(image for image, hit in zip(plan, cached, strict=True) if not hit)
        return {**rest, _PLAN: missing}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        plan, kwargs = _split(hf_kwargs)
        output = super()._apply_hf_processor_main(mm_items, kwargs)  # type: ignore[misc]
        if plan:
            output[COUNTS] = torch.tensor([[image.seen, image.kept] for image in plan])  # (images, 2)
        return output

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        _, kwargs = _split(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, kwargs))  # type: ignore[misc]
        fields[COUNTS] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        plan, kwargs = _split(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [_shortened(update, plan) if update.modality == "image" else update for update in updates]


def _split(kwargs: Mapping[str, object]) -> tuple[tuple[ImagePlan, ...], dict[str, object]]:
    """Take our plan out of the keyword arguments: the Hugging Face processor must never see it."""
    rest = dict(kwargs)
    plan: Any = rest.pop(_PLAN, ())
    return plan, rest


def _shortened(update: Any, plan: tuple[ImagePlan, ...]) -> Any:
    """Make an image's placeholder as long as what it keeps."""
    original = update.replacement

    def replacement(index: int) -> list[int]:
        placeholder: list[int] = original(index)
        image = plan[index]
        if len(placeholder) != image.seen:
            raise RuntimeError(
                f"vLLM makes a placeholder of {len(placeholder)} tokens where {image.seen} were counted"
            )
        return placeholder[: image.kept]

    return replace(update, replacement=replacement)
