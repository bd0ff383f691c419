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
    """One image or one video, and how to prune it."""

    image: str | None = Field(
        default=None,
        min_length=1,
        description="Image URL, as in a chat request: a data: URL, or http(s) if the server fetches images.",
        examples=["data:image/png;base64,..."],
    )
    video: str | None = Field(
        default=None,
        min_length=1,
        description="Video URL, as in a chat request; in place of an image.",
        examples=["data:video/mp4;base64,..."],
    )
    pictures: bool = Field(default=True, description="Whether the reply has a picture of each frame of a video.")
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
    """Tokens that were pruned together, by their own statistics: of an image, of a crop, or of a frame of a video.

    Methods that compare frames have one group for the whole video. A frame that keeps nothing has none.
    """

    tokens: list[int] = Field(description="Indices of the group's tokens in the image or video.")
    kept: list[int] = Field(description="The indices among them that are kept.")
    salient: list[int] | None = Field(
        description="The kept indices selected for saliency; the others were selected for coverage. Null if the "
        "method has no such stages."
    )
    saliency: list[float] | None = Field(description="Attention that each token receives, if the method uses it.")
    entropy: float | None = Field(description="Entropy by which the budget was split, 0 to 1.")
    report: dict[str, float] = Field(description="All figures that the method reports.")


class Frame(BaseModel):
    """One frame of a video, as the model has them: some towers merge two sampled frames into one."""

    kept: list[int] = Field(description="Indices of its kept tokens among those of the frame, ascending.")
    picture: str | None = Field(
        description="data: URL of what the model gets of the frame, at most 384 pixels wide and high; of merged "
        "frames, the first. Null without `pictures`."
    )


class Try(BaseModel):
    """One answer to the question: greedy, without penalties, cut off after 32 tokens."""

    text: str
    confidence: float | None = Field(
        description="Lowest probability of the likeliest token among its first tokens. Null if the server returns "
        "no log-probabilities that it can be read from."
    )
    kept: int = Field(description="Visual tokens in its prompt.")
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
    """Which tokens of an image or a video are kept, and why."""

    width: int = Field(description="Width in pixels: of an image as it was sent, of a video as the model gets it.")
    height: int = Field(description="Height in pixels, likewise.")
    seen: int = Field(description="Visual tokens before pruning.")
    kept: int = Field(description="Visual tokens that enter the language model.")
    method: Method | None = Field(description="Null if every token is kept.")
    boxes: list[tuple[float, float, float, float] | None] = Field(
        description="Pixel box of each token: left, top, right, bottom; null for a newline token. Of a video: of "
        "each token of a frame, since they are the same in all frames."
    )
    views: list[int] = Field(
        description="Index of the first token of each view: the whole image and, if there are any, its crops, in "
        "the model's order; or each frame of a video."
    )
    frames: list[Frame] | None = Field(description="Of a video, in order of time; null for an image.")
    indices: list[int] = Field(description="Indices of the kept tokens, ascending.")
    groups: list[Group] = Field(description="Empty if every token is kept.")
    selection_ms: float | None
    kv_cache: CacheBytes | None
    answer: Answer | None = Field(description="Null without a question.")
