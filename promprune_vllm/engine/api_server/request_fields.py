"""What one request says about its visual tokens, gathered from its fields and handed to the processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from promprune_vllm.core.budget import AUTO, FIELD, METHOD_FIELD, shown
from promprune_vllm.engine.keys import DETAIL_OPTION, TEXT_OPTION
from promprune_vllm.errors import BudgetError
from promprune_vllm.server.near_misses import XARGS

_http_fields: ContextVar[Mapping[str, Any] | None] = ContextVar("visual_token_http_fields", default=None)
_IMAGE_PARTS = ("image_url", "input_image", "image", "image_pil", "image_embeds")


@dataclass(frozen=True, slots=True)
class PruningFields:
    """Our fields of one request, not yet validated.

    Args:
        budget: Its ``visual_token_budget``; over HTTP a ``BudgetRequest``, parsed when the body was read.
        method: Its ``visual_token_method``.
        text: What the user wrote in the last turn; for methods that look at it.
        details: OpenAI's ``detail`` of each image, where the operator lets it count.
    """

    budget: object = None
    method: object = None
    text: str | None = None
    details: tuple[str, ...] | None = None

    @property
    def explicit(self) -> bool:
        """Whether the client itself asks for pruning."""
        return self.budget is not None or self.method is not None

    def as_kwargs(self) -> dict[str, object]:
        """Return this as processor options, the way vLLM hands a request's wishes on."""
        sent = {FIELD: self.budget, METHOD_FIELD: self.method}
        values = {**sent, TEXT_OPTION: self.text, DETAIL_OPTION: self.details}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def taken_from(cls, kwargs: Mapping[str, object]) -> tuple[PruningFields, dict[str, object]]:
        """Split processor options into ours and the rest, which alone the Hugging Face processor may see.

        Raises:
            BudgetError: One of them has a wrong type. Offline callers write them, and clients whom the operator
                trusts. The budget's value and the method's are left to those who read them.
        """
        rest = dict(kwargs)
        budget, method = rest.pop(FIELD, None), rest.pop(METHOD_FIELD, None)
        text: Any = rest.pop(TEXT_OPTION, None)
        details: Any = rest.pop(DETAIL_OPTION, None)
        if text is not None and not isinstance(text, str):
            raise _wrong(TEXT_OPTION, "a string", text)
        listed = isinstance(details, list | tuple) and all(isinstance(each, str) for each in details)
        if details is not None and not listed:
            raise _wrong(DETAIL_OPTION, 'a list with "low", "high" or "auto" for each image', details)
        details = None if details is None else tuple(details)
        return cls(AUTO if budget is None and method is not None else budget, method, text, details), rest


def read(request: Any, name: str) -> object:
    """Return a field of a request, unchecked: at its top level or in ``vllm_xargs``.

    Over HTTP it comes from the body that the client sent, else from the request as vLLM parsed it.

    Raises:
        BudgetError: The two contradict each other.
    """
    fields = _http_fields.get()
    if fields is None:
        fields = {**(getattr(request, "model_extra", None) or {}), XARGS: getattr(request, "vllm_xargs", None)}
    return read_from(fields, name)


def remember(fields: Mapping[str, object]) -> None:
    """Remember our fields of the HTTP request that is being handled, before a schema of vLLM's can drop them.

    Args:
        fields: By name; the budget is parsed already.
    """
    _http_fields.set(fields)


def read_from(fields: Mapping[str, Any], name: str) -> object:
    """Return a field, unchecked: of these, or of those in their ``vllm_xargs``.

    Raises:
        BudgetError: The two contradict each other.
    """
    inner = fields.get(XARGS)
    top, nested = fields.get(name), inner.get(name) if isinstance(inner, Mapping) else None
    if top is not None and nested is not None and top != nested:
        raise BudgetError(
            f"{name} is {shown(top)} at the top level and {shown(nested)} in vllm_xargs: send it once.",
            param=name,
        )
    return nested if top is None else top


def from_request(request: Any, messages: object, *, honor_detail: bool) -> PruningFields:
    """Gather what a request says.

    Args:
        request: As one of vLLM's protocols parsed it.
        messages: Its chat, if it is one.
        honor_detail: Whether ``detail`` of images counts.
    """
    turns = messages if isinstance(messages, list) else []
    details = tuple(_details(turns)) if honor_detail else ()
    spoken = details if {"low", "high"} & set(details) else None
    return PruningFields(read(request, FIELD), read(request, METHOD_FIELD), _last_words(turns), spoken)


def _wrong(name: str, wanted: str, value: object) -> BudgetError:
    return BudgetError(f"{name} must be {wanted}, got {shown(value)} ({type(value).__name__}).", param=name)


def _last_words(turns: Iterable[Any]) -> str | None:
    """Return the text of the last turn of the user."""
    words = None
    for turn in turns:
        if isinstance(turn, Mapping) and turn.get("role") == "user":
            content = turn.get("content")
            texts = [text for part in _parts(turn) if isinstance(text := part.get("text"), str)]
            words = content if isinstance(content, str) else "\n".join(texts)
    return words


def _details(turns: Iterable[Any]) -> Iterable[str]:
    """Yield the detail of every image in order of appearance."""
    for turn in turns:
        for part in _parts(turn) if isinstance(turn, Mapping) else ():
            if part.get("type") in _IMAGE_PARTS or (part.get("type") is None and "image_url" in part):
                image = part.get("image_url")
                detail = image.get("detail") if isinstance(image, Mapping) else part.get("detail")
                yield detail if isinstance(detail, str) else AUTO


def _parts(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = turn.get("content")
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list | tuple) else []
