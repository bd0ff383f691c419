"""Our fields as JSON schemas, and what our routes take and give; inspecting has a file of its own.

Clients read these in the server's OpenAPI document. A budget is checked by ``core.budget`` alone; a test compares
the schema with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from promprune_vllm.core.budget import AUTO, FIELD, FULL, MAX_BUDGET_TOKENS, MAX_IMAGES, METHOD_FIELD

MAX_COUNTED_IMAGES = 64
MAX_SIDE_PX = 65_535
"""Largest side of an image to count; that of a JPEG."""

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
        "description": "So many tokens of each image, or all of them where it has fewer.",
    },
    {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1,
        "title": "Share",
        "description": "This share of each image's tokens, rounded up.",
    },
    {
        "type": "string",
        "pattern": _PERCENT,
        "title": "Percentage",
        "description": 'A share: "25%".',
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
        "description": f'"{FULL}" keeps every token, "{AUTO}" leaves it to the server.',
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
        "description": "A budget for each image, in order of appearance.",
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
        "description": "Tokens for all images together, split in proportion to their own tokens.",
    }
    nothing = {"type": "null", "title": "Nothing", "description": "As if the field were left out."}
    return {
        "title": "Visual token budget",
        "description": "How many visual tokens of each image enter the language model. PromPrune chooses which.",
        "oneOf": [*_FORMS, each, total, nothing],
        "examples": [64, 0.25, "25%", FULL, AUTO, [64, FULL], {"total": 256}],
    }


def method_schema(allowed: Sequence[str]) -> dict[str, Any]:
    """Return the JSON schema of ``visual_token_method``.

    Args:
        allowed: Methods the operator allows, the server's own first.
    """
    return {
        "title": "Visual token method",
        "description": "The method that chooses the tokens; the server's own where the field is left out.",
        "enum": [*allowed, None],
        "examples": [allowed[0]],
    }


def field_schemas(allowed: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the JSON schemas of every field we add to requests, by name."""
    return {FIELD: budget_schema(), METHOD_FIELD: method_schema(allowed)}


AnyBudget = Annotated[Any, WithJsonSchema(budget_schema())]
"""Any JSON; validated by ``BudgetRequest.parse``, whose errors say more than pydantic's."""


class Strict(BaseModel):
    """A misspelt name is refused: it would be ignored otherwise, and the counts be those of another request."""

    model_config = ConfigDict(extra="forbid")


class ImageSize(Strict):
    """An image, of which only the size matters."""

    width: int = Field(ge=1, le=MAX_SIDE_PX, strict=True, description="Pixels.")
    height: int = Field(ge=1, le=MAX_SIDE_PX, strict=True, description="Pixels.")


class CountRequest(Strict):
    """Images and a budget to count with."""

    images: list[ImageSize] = Field(
        min_length=1,
        max_length=MAX_COUNTED_IMAGES,
        description="In order of appearance. The server's limit of images per request is not looked at.",
        examples=[[{"width": 1024, "height": 768}]],
    )
    visual_token_budget: AnyBudget = None
    detail: list[Literal["low", "high", "auto"]] | None = Field(
        default=None,
        description="OpenAI's detail of each image. Counts where the server honours it and no budget is given.",
    )


class ImageCount(BaseModel):
    """One image's visual tokens."""

    seen: int = Field(description="Before pruning.")
    kept: int = Field(description="That enter the language model.")


class CacheBytes(BaseModel):
    """What visual tokens take of the KV cache: of the whole model, all layers and ranks, not rounded to blocks."""

    bytes_per_token: int
    seen: int = Field(description="Bytes without pruning.")
    kept: int
    saved: int


class CountReply(BaseModel):
    """What a request with these images and this budget would use, right now."""

    seen: int
    kept: int
    images: list[ImageCount]
    kv_cache: CacheBytes | None = Field(
        description="Null where bytes per token are not a plain product, as with packed cache types."
    )


class ProcessorCache(BaseModel):
    """Images as the processor prepared them, in the API server that answers."""

    images: int
    bytes: int
    capacity_bytes: int


class EncoderCache(BaseModel):
    """Encoded images in one engine, pruned ones with the rows that are kept of them."""

    images: int
    rows: int
    capacity_rows: int


class CachesReply(BaseModel):
    """What the caches of images hold at this moment."""

    processor: ProcessorCache | None = Field(description="Null where it is switched off or shared memory.")
    encoder: list[EncoderCache] = Field(description="Of each engine.")


class Method(BaseModel):
    """A method with every option in force, calibration for the model's family included."""

    name: str
    options: dict[str, Any]


class Limits(BaseModel):
    """What the operator allows, and what images keep that nobody asked anything for."""

    default: int | float | str
    min: int
    max: int | None
    low: int
    out_of_range: str
    floor: int
    detail: bool


class Adaptation(BaseModel):
    """Whether "auto" keeps less at times."""

    to_load: bool
    to_content: bool
    level: float = Field(description="Share of the default that an image keeps at this moment.")


class VisualTokens(BaseModel):
    """This server and its visual tokens."""

    version: str = Field(description="Of promprune-vllm.")
    vllm_version: str
    model: str
    architecture: str
    family: str | None
    prunable: bool
    reason: str | None = Field(description="Why the model cannot be pruned.")
    method: Method
    allowed_methods: list[Method]
    limits: Limits
    adaptation: Adaptation
    fields: dict[str, dict[str, Any]] = Field(description="JSON schemas of the fields added to requests.")
