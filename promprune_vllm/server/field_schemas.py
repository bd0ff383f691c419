"""JSON schemas of our request fields.

Clients read them in the server's OpenAPI document. Only ``core`` validates a field; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from promprune_vllm.core.budget import AUTO, FIELD, FULL, MAX_BUDGET_TOKENS, MAX_IMAGES, METHOD_FIELD
from promprune_vllm.core.escalation import ESCALATE_FIELD

# Above 0 and at most 100, written with up to three digits and nine decimals.
_PERCENT = r"^(?!0+(\.0+)?%$)([0-9]{1,2}|0[0-9]{2}|100(?=%|\.0+%))(\.[0-9]{1,9})?%$"
_TOKENS_TEXT = r"([1-9][0-9]{0,5}|1000000)(\.0{1,9})?"
_SHARE_TEXT = r"0\.(?!0+$)[0-9]{1,9}"
_FORMS: tuple[dict[str, Any], ...] = (
    {
        "type": "integer",
        "minimum": 1,
        "maximum": MAX_BUDGET_TOKENS,
        "title": "Tokens",
        "description": "Number of tokens to keep per image or video; one with fewer keeps all.",
    },
    {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1,
        "title": "Share",
        "description": "Share of the tokens of each image or video to keep, rounded up.",
    },
    {
        "type": "string",
        "pattern": _PERCENT,
        "title": "Percentage",
        "description": 'A share, such as "25%".',
    },
    {
        "type": "string",
        "pattern": f"^({_TOKENS_TEXT}|{_SHARE_TEXT})$",
        "title": "Number as text",
        "description": 'For clients that cannot send numbers: "64" is 64, "0.25" is 0.25.',
    },
    {
        "type": "string",
        "enum": [FULL, AUTO],
        "title": "Word",
        "description": f'"{FULL}" keeps every token, "{AUTO}" lets the server decide.',
    },
)


def _tokens_in(key: str, title: str, description: str) -> dict[str, Any]:
    """Return the schema of an object whose only key is a number of tokens."""
    tokens = [
        {"type": "integer", "minimum": 1, "maximum": MAX_BUDGET_TOKENS},
        {"type": "string", "pattern": f"^{_TOKENS_TEXT}$"},
    ]
    return {
        "type": "object",
        "properties": {key: {"oneOf": tokens}},
        "required": [key],
        "additionalProperties": False,
        "title": title,
        "description": description,
    }


_NOTHING = {"type": "null", "title": "Nothing", "description": "Same as leaving the field out."}


def budget_schema() -> dict[str, Any]:
    """Return the JSON schema of ``visual_token_budget``."""
    per_frame = _tokens_in(
        "per_frame",
        "Per frame",
        "Tokens to keep per frame of each video. Images beside the videos keep the default.",
    )
    each = {
        "type": "array",
        "items": {"oneOf": [*_FORMS, per_frame]},
        "minItems": 1,
        "maxItems": MAX_IMAGES,
        "title": "One entry per image or video",
        "description": "One budget per image or video, in order of appearance.",
    }
    total = _tokens_in(
        "total", "Total", "Tokens for all images and videos together, split in proportion to their token counts."
    )
    return {
        "title": "Visual token budget",
        "description": "How many visual tokens of each image and video enter the language model. "
        "PromPrune selects which.",
        "oneOf": [*_FORMS, per_frame, each, total, _NOTHING],
        "examples": [64, 0.25, "25%", FULL, AUTO, {"per_frame": 32}, [64, FULL], {"total": 256}],
    }


def method_schema(allowed: Sequence[str]) -> dict[str, Any]:
    """Return the JSON schema of ``visual_token_method``.

    Args:
        allowed: Methods the operator allows, the server's default first.
    """
    return {
        "title": "Visual token method",
        "description": "Method that selects the tokens; the server's default if the field is left out.",
        "enum": [*allowed, None],
        "examples": [allowed[0]],
    }


def escalation_schema() -> dict[str, Any]:
    """Return the JSON schema of ``visual_token_escalate``."""
    threshold = {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "title": "Threshold",
        "description": "Answer again if the first answer's confidence is below this probability.",
    }
    text = {
        "type": "string",
        "pattern": rf"^(1(\.0{{1,9}})?|{_SHARE_TEXT})$",
        "title": "Threshold as text",
        "description": "For clients that cannot send numbers.",
    }
    both = {
        "type": "object",
        "properties": {
            "below": {"oneOf": [threshold, text, _NOTHING]},
            "to": {"oneOf": [*_FORMS[:-1], {"type": "string", "enum": [FULL], "title": "Word"}, _NOTHING]},
        },
        "additionalProperties": False,
        "minProperties": 1,
        "title": "Threshold and budget",
        "description": "The budget, of each image and video, of the second try; what is left out is the server's.",
    }
    switch = {
        "type": "boolean",
        "title": "Switch",
        "description": "true for the server's threshold and budget, false for no second try.",
    }
    return {
        "title": "Escalation",
        "description": "Whether the server may answer again, with more visual tokens, if its first answer's "
        "confidence is low: the lowest probability of the likeliest token among its first tokens.",
        "oneOf": [threshold, text, both, switch, _NOTHING],
        "examples": [0.9, {"below": 0.9, "to": FULL}, True, False],
    }


def field_schemas(allowed: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the JSON schemas of every field we add to requests, by name."""
    return {
        FIELD: budget_schema(),
        METHOD_FIELD: method_schema(allowed),
        ESCALATE_FIELD: escalation_schema(),
    }
