"""JSON schemas of our request fields, and the bodies of our routes (those of inspect: ``inspect_schemas.py``).

Clients read them in the server's OpenAPI document. Only ``core.budget`` validates a budget; a test compares the
schema with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from promprune_vllm.core.budget import AUTO, FIELD, FULL, MAX_BUDGET_TOKENS, MAX_IMAGES, METHOD_FIELD

MAX_COUNTED_IMAGES = 64
MAX_SIDE_PX = 65_535
"""Largest width or height of an image to count; JPEG's limit."""

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
        "description": "Number of tokens to keep per image; an image with fewer keeps all.",
    },
    {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1,
        "title": "Share",
        "description": "Share of each image's tokens to keep, rounded up.",
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


def budget_schema() -> dict[str, Any]:
    """Return the JSON schema of ``visual_token_budget``."""
    each = {
        "type": "array",
        "items": {"oneOf": list(_FORMS)},
        "minItems": 1,
        "maxItems": MAX_IMAGES,
        "title": "One entry per image",
        "description": "One budget per image, in order of appearance.",
    }
    total = {
        "type": "object",
        "properties": {
            "total": {
                "oneOf": [
                    {"type": "integer", "minimum": 1, "maximum": MAX_BUDGET_TOKENS},
                    {"type": "string", "pattern": f"^{_TOKENS_TEXT}$"},
                ]
            }
        },
        "required": ["total"],
        "additionalProperties": False,
        "title": "Total",
        "description": "Tokens for all images together, split in proportion to their token counts.",
    }
    nothing = {"type": "null", "title": "Nothing", "description": "Same as leaving the field out."}
    return {
        "title": "Visual token budget",
        "description": "How many visual tokens of each image enter the language model. PromPrune selects which.",
        "oneOf": [*_FORMS, each, total, nothing],
        "examples": [64, 0.25, "25%", FULL, AUTO, [64, FULL], {"total": 256}],
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


def field_schemas(allowed: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the JSON schemas of every field we add to requests, by name."""
    return {FIELD: budget_schema(), METHOD_FIELD: method_schema(allowed)}


AnyBudget = Annotated[Any, WithJsonSchema(budget_schema())]
"""Any JSON; validated by ``BudgetRequest.parse``, whose errors say more than pydantic's."""


class Strict(BaseModel):
    """Refuses unknown fields: a misspelled one would be ignored, and the counts would be for another request."""

    model_config = ConfigDict(extra="forbid")


class ImageSize(Strict):
    """Size of an image; counting needs nothing else of it."""

    width: int = Field(ge=1, le=MAX_SIDE_PX, strict=True, description="In pixels.")
    height: int = Field(ge=1, le=MAX_SIDE_PX, strict=True, description="In pixels.")


class CountRequest(Strict):
    """Image sizes and a budget, for counting."""

    images: list[ImageSize] = Field(
        min_length=1,
        max_length=MAX_COUNTED_IMAGES,
        description="In order of appearance. The server's limit of images per request is not applied.",
        examples=[[{"width": 1024, "height": 768}]],
    )
    visual_token_budget: AnyBudget = None
    detail: list[Literal["low", "high", "auto"]] | None = Field(
        default=None,
        description="OpenAI's detail for each image. Used if the server honors it and there is no budget.",
    )


class ImageCount(BaseModel):
    """Visual tokens of one image."""

    seen: int = Field(description="Visual tokens before pruning.")
    kept: int = Field(description="Visual tokens that enter the language model.")


class CacheBytes(BaseModel):
    """KV cache used by visual tokens, in all layers and on all ranks, not rounded up to blocks."""

    bytes_per_token: int
    seen: int = Field(description="Bytes without pruning.")
    kept: int
    saved: int


class CountReply(BaseModel):
    """Tokens and KV cache that a request with these images and this budget would use right now."""

    seen: int
    kept: int
    images: list[ImageCount]
    kv_cache: CacheBytes | None = Field(
        description="Null if bytes per token cannot be computed, as with packed cache types."
    )


class ProcessorCache(BaseModel):
    """Preprocessed images in the API server that answers."""

    images: int
    bytes: int
    capacity_bytes: int


class EncoderCache(BaseModel):
    """Encoded images in one engine; a pruned image counts with its kept rows."""

    images: int
    rows: int
    capacity_rows: int


class FeatureCache(BaseModel):
    """Unpruned images in one engine's host memory, on its first rank; each can be pruned anew without encoding."""

    images: int
    bytes: int
    capacity_bytes: int


class CachesReply(BaseModel):
    """What the image caches hold right now."""

    processor: ProcessorCache | None = Field(description="Null if the cache is off or in shared memory.")
    encoder: list[EncoderCache] = Field(description="One entry per engine.")
    features: list[FeatureCache] | None = Field(
        description="One entry per engine; null without --visual-token-feature-cache-gb."
    )


class Method(BaseModel):
    """A method with every option in force, including the calibration for the model's family."""

    name: str
    options: dict[str, Any]


class Limits(BaseModel):
    """The operator's limits, and the default for requests that set no budget."""

    default: int | float | str
    min: int
    max: int | None
    low: int
    out_of_range: str
    floor: int
    detail: bool


class Adaptation(BaseModel):
    """Whether "auto" and the default budget adapt to load or content."""

    to_load: bool
    to_content: bool
    level: float = Field(description="Share of the default that an image keeps right now.")


class PartOff(BaseModel):
    """A part of promprune-vllm that does not run on this vLLM."""

    part: str
    effect: str = Field(description="What is different without it.")
    changed: list[str] = Field(description="What this vLLM has changed of what the part depends on.")


class VllmCheck(BaseModel):
    """How this vLLM compares with the versions that promprune-vllm was tested with."""

    tested: bool = Field(description="Whether this very version was tested. If so, nothing was compared.")
    compared_with: str = Field(description="The tested version that this one was compared with.")
    compared: int = Field(description="How many functions and classes of vLLM were compared.")
    off: list[PartOff]
    ignored: list[str] = Field(description="Changes that PROMPRUNE_UNTESTED_VLLM=1 makes the server ignore.")


class VisualTokens(BaseModel):
    """The server's model, methods, limits and request fields."""

    version: str = Field(description="Version of promprune-vllm.")
    vllm_version: str
    vllm_check: VllmCheck
    model: str
    architecture: str
    family: str | None
    prunable: bool
    reason: str | None = Field(description="Why the model cannot be pruned; null if it can.")
    method: Method
    allowed_methods: list[Method]
    limits: Limits
    adaptation: Adaptation
    fields: dict[str, dict[str, Any]] = Field(description="JSON schemas of the fields that requests may add.")
