"""Our fields of one request, gathered and passed on to the processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from promprune_vllm.core.budget import AUTO, FIELD, METHOD_FIELD, shown
from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.engine.keys import DETAIL_OPTION, TEXT_OPTION
from promprune_vllm.errors import BudgetError
from promprune_vllm.server.near_misses import FIELDS, XARGS

_http_fields: ContextVar[Mapping[str, Any] | None] = ContextVar("visual_token_http_fields", default=None)
_IMAGE_PARTS = ("image_url", "input_image", "image", "image_pil", "image_embeds")


@dataclass(frozen=True, slots=True)
class PruningFields:
    """Our fields of one request, not yet validated.

    Args:
        budget: ``visual_token_budget``.
        method: ``visual_token_method``.
        text: The user's last message, for methods that use it.
        details: OpenAI's ``detail`` of each image, if the server honors it.
        escalate: ``visual_token_escalate``.
    """

    budget: object = None
    method: object = None
    text: str | None = None
    details: tuple[str, ...] | None = None
    escalate: object = None

    @property
    def explicit(self) -> bool:
        """Whether the client sent a budget or a method."""
        return self.budget is not None or self.method is not None

    def as_kwargs(self) -> dict[str, object]:
        """Return the fields that are set as processor options, which vLLM passes on to the processor."""
        sent = {FIELD: self.budget, METHOD_FIELD: self.method, ESCALATE_FIELD: self.escalate}
        values = {**sent, TEXT_OPTION: self.text, DETAIL_OPTION: self.details}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def split_options(cls, kwargs: Mapping[str, object]) -> tuple[PruningFields, dict[str, object]]:
        """Split processor options into our fields and the rest. The Hugging Face processor may see only the rest.

        Offline programs set our options, and clients whom the operator trusts. The values of the budget and the
        method are checked later.

        Raises:
            BudgetError: One of our options has a wrong type.
        """
        rest = dict(kwargs)
        budget, method, escalate = (rest.pop(name, None) for name in FIELDS)
        text: Any = rest.pop(TEXT_OPTION, None)
        details: Any = rest.pop(DETAIL_OPTION, None)
        if text is not None and not isinstance(text, str):
            raise _type_error(TEXT_OPTION, "a string", text)
        is_string_list = isinstance(details, list | tuple) and all(isinstance(each, str) for each in details)
        if details is not None and not is_string_list:
            raise _type_error(DETAIL_OPTION, 'a list with "low", "high" or "auto" for each image', details)
        details = None if details is None else tuple(details)
        budget = AUTO if budget is None and method is not None else budget
        return cls(budget, method, text, details, escalate), rest


def read_field(request: Any, name: str) -> object:
    """Return a field of a request, unchecked, from its top level or from ``vllm_xargs``.

    Over HTTP, the body that the client sent counts; otherwise the request as vLLM parsed it.

    Raises:
        BudgetError: The top level and ``vllm_xargs`` contradict each other.
    """
    fields = _http_fields.get()
    if fields is None:
        fields = {**(getattr(request, "model_extra", None) or {}), XARGS: getattr(request, "vllm_xargs", None)}
    return find_field(fields, name)


def remember_http_fields(body: Mapping[str, Any]) -> None:
    """Remember our fields of the current HTTP request.

    Args:
        body: Its decoded JSON, before any of vLLM's schemas can drop a field.
    """
    _http_fields.set({name: body[name] for name in (*FIELDS, XARGS) if name in body})


def find_field(fields: Mapping[str, Any], name: str) -> object:
    """Return one of the fields, unchecked, from the top level or from ``vllm_xargs``.

    Raises:
        BudgetError: The top level and ``vllm_xargs`` contradict each other.
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
    """Gather our fields of a request.

    Args:
        request: The request as vLLM parsed it.
        messages: The messages of a chat, otherwise ``None``.
        honor_detail: Whether the server honors ``detail`` of images.
    """
    messages = messages if isinstance(messages, list) else []
    details = tuple(_details(messages)) if honor_detail else ()
    explicit_details = details if {"low", "high"} & set(details) else None
    text = _last_user_text(messages)
    budget, method, escalate = (read_field(request, name) for name in FIELDS)
    return PruningFields(budget, method, text, explicit_details, escalate)


def _type_error(name: str, expected: str, value: object) -> BudgetError:
    return BudgetError(f"{name} must be {expected}, got {shown(value)} ({type(value).__name__}).", param=name)


def _last_user_text(messages: Iterable[Any]) -> str | None:
    """Return the text of the user's last message."""
    text = None
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = message.get("content")
            parts = [each for part in _parts(message) if isinstance(each := part.get("text"), str)]
            text = content if isinstance(content, str) else "\n".join(parts)
    return text


def _details(messages: Iterable[Any]) -> Iterable[str]:
    """Yield the detail of every image in order of appearance."""
    for message in messages:
        for part in _parts(message) if isinstance(message, Mapping) else ():
            if part.get("type") in _IMAGE_PARTS or (part.get("type") is None and "image_url" in part):
                image = part.get("image_url")
                detail = image.get("detail") if isinstance(image, Mapping) else part.get("detail")
                yield detail if isinstance(detail, str) else AUTO


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list | tuple) else []
