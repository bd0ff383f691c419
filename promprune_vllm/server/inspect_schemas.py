"""Request and reply of ``POST /v1/visual_tokens/inspect``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from promprune_vllm.core.budget import METHOD_FIELD
from promprune_vllm.server.field_schemas import escalation_schema
from promprune_vllm.server.schemas import AnyBudget, CacheBytes, Method, Strict

MAX_TEXT_CHARACTERS = 4096
AnyEscalation = Annotated[Any, WithJsonSchema(escalation_schema())]
"""Any JSON; validated by ``EscalationRequest.parse``."""


class InspectRequest(Strict):
    """One image, and how to prune it."""

    image: str = Field(
        min_length=1,
        description="Image URL, as in a chat request: a data: URL, or http(s) if the server fetches images.",
        examples=["data:image/png;base64,..."],
    )
    visual_token_budget: AnyBudget = None
    visual_token_method: Any = Field(default=None, description=f"Same as {METHOD_FIELD} in a chat request.")
    detail: Literal["low", "high", "auto"] | None = Field(
        default=None, description="OpenAI's detail for the image."
    )
    text: str | None = Field(
        default=None,
        max_length=MAX_TEXT_CHARACTERS,
        description="The question: for the answer, and for methods that use it.",
    )
    answer: bool = Field(default=True, description="Whether to answer the question, if there is one.")
    visual_token_escalate: AnyEscalation = None


class Group(BaseModel):
    """Tokens that were pruned together, by their own statistics: the whole image, or one of its crops."""

    tokens: list[int] = Field(description="Indices of the group's tokens in the image.")
    kept: list[int] = Field(description="The indices among them that are kept.")
    salient: list[int] | None = Field(
        description="The kept indices selected for saliency; the others were selected for coverage. Null if the "
        "method has no such stages."
    )
    saliency: list[float] | None = Field(description="Attention that each token receives, if the method uses it.")
    entropy: float | None = Field(description="Entropy by which the budget was split, 0 to 1.")
    report: dict[str, float] = Field(description="All figures that the method reports.")


class Try(BaseModel):
    """One answer to the question: greedy, without penalties, cut off after 32 tokens."""

    text: str
    confidence: float | None = Field(
        description="Lowest probability of the likeliest token among its first tokens. Null if the server returns "
        "no log-probabilities that it can be read from."
    )
    kept: int = Field(description="Visual tokens of the image in its prompt.")
    prompt_tokens: int
    completion_tokens: int


class Answer(Try):
    """The answer that a client gets."""

    below: float | None = Field(
        description="Threshold of confidence in force; null if no answer is asked for again here."
    )
    first: Try | None = Field(
        description="The answer with the kept tokens, if it was thrown away for this one; null if it is this one."
    )


class InspectReply(BaseModel):
    """Which of an image's tokens are kept, and why."""

    width: int = Field(description="Image width in pixels.")
    height: int = Field(description="Image height in pixels.")
    seen: int = Field(description="Visual tokens before pruning.")
    kept: int = Field(description="Visual tokens that enter the language model.")
    method: Method | None = Field(description="Null if every token is kept.")
    boxes: list[tuple[float, float, float, float] | None] = Field(
        description="Pixel box of each token: left, top, right, bottom; null for a newline token."
    )
    views: list[int] = Field(
        description="Index of the first token of each view: the whole image and, if there are any, its crops, in "
        "the model's order."
    )
    indices: list[int] = Field(description="Indices of the kept tokens, ascending.")
    groups: list[Group] = Field(description="Empty if every token is kept.")
    selection_ms: float | None
    kv_cache: CacheBytes | None
    answer: Answer | None = Field(description="Null without a question.")
