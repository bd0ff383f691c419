"""Refuses misspelled or misplaced fields: names in a request that are close to ours.

vLLM's schemas ignore unknown fields, so without this check such a request would keep every token, and its reply
would not say why. Only names close to our own are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from promprune_vllm.core.budget import FIELD, METHOD_FIELD, shown
from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.errors import BudgetError

FIELDS = (FIELD, METHOD_FIELD, ESCALATE_FIELD)
XARGS = "vllm_xargs"
WRAPPERS = ("extra_body", "extra_args", "sampling_params", "chat_template_kwargs")
"""Objects in which clients send our fields by mistake. (The OpenAI SDK unpacks ``extra_body``; other clients send
it literally.)"""
CONTENT = ("messages", "input", "inputs", "documents", "queries", "content_parts", "data_1", "data_2")
"""Request fields that can contain image and video parts."""
MEDIA_TYPES = (
    *("image_url", "input_image", "image", "image_pil", "image_embeds"),
    *("video_url", "video", "video_embeds"),
)
_PREFIX = "visual_token_"
_CLOSE = 0.82  # "vision_token_budget" scores 0.84; vLLM's own "thinking_token_budget" scores 0.70
_LONGEST_NAME = 40
_DEEPEST = 8


def check(body: Mapping[str, Any]) -> None:
    """Check the field names of a request.

    Args:
        body: The decoded JSON of the request.

    Raises:
        BudgetError: A name is close to one of ours; one of ours is where it would be ignored; or its value has a
            type that vLLM does not accept there.
    """
    for where, names in (("", body), (f" in {XARGS!r}", body.get(XARGS))):
        for name in _names(names):
            if name not in FIELDS and (meant := closest_field(name)):
                raise BudgetError(
                    f"Unknown field {name!r}{where}. Did you mean {meant!r}?", param=name, reason="field"
                )
    _check_xargs(body.get(XARGS))
    for wrapper in WRAPPERS:
        _refuse_misplaced(_names(body.get(wrapper)), wrapper)
    for container in CONTENT:
        for part in _media_parts(body.get(container), _DEEPEST):
            _refuse_misplaced(_names(part), container)
            for inner in part.values():
                _refuse_misplaced(_names(inner), container)


def _check_xargs(values: object) -> None:
    """Refuse values that vLLM's schema of ``vllm_xargs`` cannot hold; some routes refuse them without a reason."""
    if not isinstance(values, Mapping):
        return
    for name in FIELDS:
        if name in values and not _fits_xargs(values[name]):
            raise BudgetError(
                f"{name} in {XARGS!r} must be a number, a string or a list of those, got {shown(values[name])}. "
                f"Send anything else at the top level of the request, and leave it out of {XARGS!r}.",
                param=name,
            )


def _fits_xargs(value: object) -> bool:
    each = value if isinstance(value, list) else [value]
    return all(isinstance(one, str | int | float) for one in each)


def closest_field(name: str) -> str | None:
    """Return our field that a name was probably meant to be, or ``None`` if it is not close to any."""
    if len(name) > _LONGEST_NAME:
        return None
    spelled = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", name).lower()
    close = difflib.get_close_matches(spelled, FIELDS, n=1, cutoff=_CLOSE)
    if close:
        return close[0]
    return FIELD if spelled.startswith(_PREFIX) else None


def _refuse_misplaced(names: Iterator[str], where: str) -> None:
    for name in names:
        if meant := closest_field(name):
            raise BudgetError(
                f"{name!r} inside {where!r} would be ignored. Send {meant!r} at the top level of the request, "
                f"next to 'model', or in {XARGS!r}. For a budget per image or video, send a list.",
                param=name,
                reason="field",
            )


def _names(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (name for name in value if isinstance(name, str))


def _media_parts(value: object, depth: int) -> Iterator[Mapping[str, Any]]:
    """Yield the image and video parts in messages. Arguments of tool calls are skipped."""
    if depth == 0:
        return
    if isinstance(value, Mapping):
        if value.get("type") in MEDIA_TYPES or "image_url" in value or "video_url" in value:
            yield value
        else:
            yield from _media_parts(value.get("content"), depth - 1)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, Mapping | list):
                yield from _media_parts(inner, depth - 1)
