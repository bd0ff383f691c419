"""What ``POST /v1/visual_tokens/inspect`` takes and gives."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from promprune_vllm.core.budget import METHOD_FIELD
from promprune_vllm.server.schemas import AnyBudget, CacheBytes, Method, Strict

MAX_TEXT_CHARACTERS = 4096


class InspectRequest(Strict):
    """One image and what is to be kept of it."""

    image: str = Field(
        min_length=1,
        description="Its address, as in a chat request: a data: URL, or http(s) where the server fetches images.",
        examples=["data:image/png;base64,..."],
    )
    visual_token_budget: AnyBudget = None
    visual_token_method: Any = Field(default=None, description=f"As {METHOD_FIELD} of a chat request.")
    detail: Literal["low", "high", "auto"] | None = Field(
        default=None, description="OpenAI's detail of the image."
    )
    text: str | None = Field(
        default=None, max_length=MAX_TEXT_CHARACTERS, description="What is asked, for methods that look at it."
    )


class Group(BaseModel):
    """Tokens that were selected from on their own statistics: the image, or one of its crops."""

    tokens: list[int] = Field(description="Which tokens of the image these are.")
    kept: list[int] = Field(description="Which of the image's tokens stay, of these.")
    salient: list[int] | None = Field(
        description="Those taken for their saliency; the others cover. Null where the method has no such stages."
    )
    saliency: list[float] | None = Field(
        description="Attention each of the tokens gets, if the method looked at it."
    )
    entropy: float | None = Field(description="That decided how the budget was split, 0 to 1.")
    report: dict[str, float] = Field(description="All that the method tells of itself.")


class InspectReply(BaseModel):
    """What became of an image."""

    width: int = Field(description="Of the image, in pixels.")
    height: int
    seen: int = Field(description="Visual tokens before pruning.")
    kept: int = Field(description="That enter the language model.")
    method: Method | None = Field(description="Null where every token was kept.")
    boxes: list[tuple[float, float, float, float] | None] = Field(
        description="Where each token looks: left, top, right, bottom in pixels; null for one that shows nothing."
    )
    views: list[int] = Field(
        description="The first token of each view the model has of the image: all of it, or that and then crops."
    )
    indices: list[int] = Field(description="The kept tokens, ascending.")
    groups: list[Group] = Field(description="Empty where every token was kept.")
    selection_ms: float | None
    kv_cache: CacheBytes | None
