"""The bodies of our routes (those of inspect: ``inspect_schemas.py``), as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from promprune_vllm.core.budget import METHOD_FIELD
from promprune_vllm.server.field_schemas import budget_schema

MAX_COUNTED_IMAGES = 64
MAX_SIDE_PX = 65_535
"""Largest width or height of an image to count; JPEG's limit."""

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
    """Image sizes or videos, and a budget, for counting."""

    images: list[ImageSize] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_COUNTED_IMAGES,
        description="In order of appearance. The server's limit of images per request is not applied.",
        examples=[[{"width": 1024, "height": 768}]],
    )
    videos: list[str] | None = Field(
        default=None,
        min_length=1,
        description="URLs of videos, in place of images. To count their tokens, the server loads, samples and "
        "resizes them, under the limits of a chat request.",
        examples=[["data:video/mp4;base64,..."]],
    )
    visual_token_budget: AnyBudget = None
    visual_token_method: Any = Field(
        default=None,
        description=f"Same as {METHOD_FIELD} in a chat request. It changes no count, but there are budgets that a "
        "method does not take.",
    )
    detail: list[Literal["low", "high", "auto"]] | None = Field(
        default=None,
        description="OpenAI's detail for each image. Used if the server honors it and there is no budget.",
    )


class ImageCount(BaseModel):
    """Visual tokens of one image or video."""

    seen: int = Field(description="Visual tokens before pruning.")
    kept: int = Field(description="Visual tokens that enter the language model.")


class CacheBytes(BaseModel):
    """KV cache used by visual tokens, in all layers and on all ranks, not rounded up to blocks."""

    bytes_per_token: int
    seen: int = Field(description="Bytes without pruning.")
    kept: int
    saved: int


class CountReply(BaseModel):
    """Tokens and KV cache that a request with these images or videos and this budget would use right now."""

    seen: int
    kept: int
    images: list[ImageCount]
    videos: list[ImageCount]
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
    """A method with every option in force, including the calibration for the model's family.

    ``over_frames``: it compares the frames of a video, and prunes no images.
    ``prunes``: what it prunes on this server, "image" and "video".
    """

    name: str
    options: dict[str, Any]
    over_frames: bool = False
    prunes: list[str] = Field(default_factory=list)


class Range(BaseModel):
    """The default for requests that set no budget, and the limits of budgets."""

    default: int | float | str | dict[str, int]
    min: int
    max: int | None


class Limits(Range):
    """The operator's limits and default: those at the top are for images."""

    videos: Range
    low: int
    out_of_range: str
    floor: int
    detail: bool


class Adaptation(BaseModel):
    """Whether "auto" and the default budget adapt to load or content."""

    to_load: bool
    to_content: bool
    level: float = Field(description="Share of the default that an image keeps right now.")


class Escalation(BaseModel):
    """When answers of requests without ``visual_token_escalate`` are asked for again; the rest is the default."""

    on: bool = Field(description="Whether requests without the field may be answered again.")
    below: float = Field(description="Answer again if the first answer's confidence is below this.")
    to: int | float | str = Field(description="Budget of each image in the second try.")
    window: int = Field(description="How many tokens of the first answer decide.")
    reason: str | None = Field(description="Why this server answers once; null if it can answer again.")


class Audit(BaseModel):
    """Whether answers of pruned requests are compared with what all visual tokens would say."""

    on: bool
    share: float = Field(description="Share of the pruned requests that are audited.")
    reason: str | None = Field(description="Why this server cannot audit answers; null if it can.")


class TargetSize(BaseModel):
    """What images of one class of sizes keep under a target, and what audits have found."""

    up_to: int | None = Field(description="Visual tokens of the largest image; null for the last class.")
    share: float = Field(description="Share of its visual tokens that an image keeps.")
    next_share: float | None = Field(description="The share on trial; null at the smallest.")
    proof: float = Field(description="How far it is proven that the share on trial keeps the target; taken at 1.")
    agreed: float = Field(description="Answers that would have been the same with the share on trial.")
    differed: float = Field(description="Those that would not.")


class Target(BaseModel):
    """Whether audits decide what images of requests without a budget keep."""

    agreement: float | None = Field(description="Share of the answers that are to stay the same; null if off.")
    sizes: list[TargetSize]


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
    escalation: Escalation
    audit: Audit
    target: Target
    fields: dict[str, dict[str, Any]] = Field(description="JSON schemas of the fields that requests may add.")
