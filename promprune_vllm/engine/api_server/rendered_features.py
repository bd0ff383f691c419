"""Records the images of prompts on their way to the engine, also if a render server has processed them.

This server has processed most prompts itself. Prompts of ``/inference/v1/generate`` with ``features`` come from a
render server, and each image carries its token counts in its fields. A client could have changed those, so they
are checked here: in the engine, a wrong one would be a server error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import IMAGE, KINDS, VIDEO
from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.core.registry import methods
from promprune_vllm.engine.api_server import request_fields
from promprune_vllm.engine.api_server.all_media import order_of_ranges
from promprune_vllm.engine.api_server.placeholders import ARTICLES
from promprune_vllm.engine.api_server.pruning_plan import MAX_TEXT_TOKENS, ImagePlan, Summary, record_prompt_images
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.keys import ASK_AGAIN, AUDIT, COUNTS, IDENTITY, LAYOUT, SUMMARY, TEXT_TOKENS, field_of
from promprune_vllm.errors import BudgetError
from promprune_vllm.server.near_misses import FIELDS
from promprune_vllm.server.usage import current_usage

_NEXT_STEP = (
    "Send the features exactly as the render server returned them, and give both servers the same PROMPRUNE_* "
    "settings."
)


def record_prompt(original: Any) -> Any:
    """Wrap a call of the engine: record the prompt's images.

    The wrapper is a plain function, not a generator, so that this happens before a stream's headers are sent.
    """

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompt = kwargs["prompt"] if "prompt" in kwargs else args[0]
        if isinstance(prompt, dict) and prompt.get("type") == "multimodal":
            for key in (ASK_AGAIN, AUDIT):  # frees the images: what is pooled is not asked again
                prompt.pop(key, None)
            # If images are recorded already, this is a beam of the same request; it has no summary.
            if SUMMARY not in prompt and current_usage() is None:
                _add_summary(prompt, self.model_config, self.input_processor.renderer.mm_processor)
            record_prompt_images(prompt)
        return original(self, *args, **kwargs)

    return start


def _add_summary(prompt: dict[str, Any], model_config: Any, processor: Any) -> None:
    """Add the summary that our processor would have added, built from the images' fields."""
    items = {kind: prompt["mm_kwargs"][kind] for kind in KINDS if prompt["mm_kwargs"].get(kind)}
    if not items:
        return
    with refusing(model_config):
        _refuse_fields()
        ranges = {kind: prompt["mm_placeholders"][kind] for kind in items}
        if hasattr(processor, "kinds"):  # vLLM's own processor has no such attribute
            for each in ranges.values():
                refuse_text_among(each, prompt["prompt_token_ids"])
        if any(item is None for each in items.values() for item in each):
            return  # the engine already has this image, and its counts are unknown here
        settings = Settings.from_environment()
        vocabulary = int(model_config.get_vocab_size())
        images = tuple(
            _checked_plan(items[kind][i], ranges[kind][i].get_num_embeds(), settings, vocabulary, kind)
            for kind, i in order_of_ranges(ranges)
        )
    method = settings.allowed[next((image.method for image in images if image.kept < image.total), 0)]
    prompt[SUMMARY] = Summary(images, (False,) * len(images), method, None)


def refuse_text_among(placeholders: Sequence[Any], tokens: Sequence[int]) -> None:
    """Refuse what has text among its visual tokens, such as Qwen3-VL's videos: the engine would end.

    vLLM does not pass on which tokens of a placeholder are visual, so the engine would expect a row for each.

    Args:
        placeholders: Of the images and videos, vLLM's ``PlaceholderRange``.
        tokens: Of the prompt.

    Raises:
        BudgetError: A placeholder without a mask has tokens of several ids.
    """
    for placeholder in placeholders:
        start, end = placeholder.offset, placeholder.offset + placeholder.length
        if placeholder.is_embed is None and len(set(tokens[start:end])) > 1:
            raise BudgetError(
                "The place of an image or a video has tokens of several ids, as with InternVL's images and "
                "Qwen3-VL's videos, and features do not say which of them are visual. Send the image or the video "
                "itself in content_parts instead.",
                param="features",
                reason="unsupported",
            )


def _refuse_fields() -> None:
    for name in FIELDS:
        if request_fields.read_field(None, name) not in (None, False):
            next_step = "Leave it out" if name == ESCALATE_FIELD else f"Send {name} to its render route instead"
            raise BudgetError(
                f"{name} cannot be applied to images and videos sent as features: the render server has already "
                f"processed them. {next_step}.",
                param=name,
                reason="unsupported",
            )


def _checked_plan(item: Any, length: int, settings: Settings, vocabulary: int, kind: str = IMAGE) -> ImagePlan:
    """Return the plan in an image's or video's fields.

    Raises:
        BudgetError: The fields contradict the placeholder or this server's settings.
    """
    counts_name, text_name, identity_name = [field_of(kind, name) for name in (COUNTS, TEXT_TOKENS, IDENTITY)]
    if counts_name not in item:  # rendered without this plugin
        return ImagePlan(length, length, kind=kind)
    counts = item[counts_name].data
    text = item[text_name].data if text_name in item else torch.empty(0, dtype=torch.int64)
    if not _is_ids(counts) or counts.shape != (3,) or not _is_ids(text) or text.ndim != 1:
        raise _features_error(kind, f"{counts_name} or {text_name} has a wrong shape or type")
    if identity_name in item and not _is_identity(item[identity_name].data):
        raise _features_error(kind, f"{identity_name} has a wrong shape or type")
    total, kept, method = counts.tolist()
    layout = item.get(field_of(VIDEO, LAYOUT))
    if layout is not None and not (_is_ids(layout.data) and layout.data.shape == (0,)):
        # Where there is such text, there is some before the frames as well, which ``refuse_text_among`` refuses.
        raise _features_error(
            kind, "they have text among the visual tokens, and their place in the prompt has none"
        )
    if not 1 <= kept <= total or kept != length:
        raise _features_error(kind, f"they keep {kept} of {total} tokens, but the placeholder has {length}")
    if not 0 <= method < len(settings.allowed):
        raise _features_error(kind, f"they name method {method}, but this server allows {len(settings.allowed)}")
    if len(text) > MAX_TEXT_TOKENS or not all(0 <= token < vocabulary for token in text.tolist()):
        raise _features_error(
            kind,
            f"their text has {len(text)} tokens of at most {MAX_TEXT_TOKENS}, or token ids that the model lacks",
        )
    if kept < total and kind == IMAGE and methods()[settings.allowed[method]].over_frames:
        raise _features_error(kind, f"method {settings.allowed[method]!r} compares frames, which an image has not")
    if kept < total and not settings.media_policy().of(kind).allows(kept, total):
        raise _features_error(kind, f"{kept} of {total} tokens are outside this server's limits")
    return ImagePlan(total, kept, method, kind=kind)


def _is_ids(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64


def _is_identity(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.shape == (16,)


def _features_error(kind: str, why: str) -> BudgetError:
    return BudgetError(f"The features of {ARTICLES[kind]} cannot be used: {why}. {_NEXT_STEP}", param="features")
