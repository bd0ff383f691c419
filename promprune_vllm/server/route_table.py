"""What ``visual_token_budget`` does on every route of vLLM's HTTP servers, and in every offline entry point.

The servers' API document, docs/requests.md and tests read it. A test walks the OpenAPI document of each kind of
server and fails on a route that is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Effect = Literal["obeys", "refuses", "no image"]


@dataclass(frozen=True, slots=True)
class Route:
    """One route, or one offline entry point.

    Args:
        effect: ``obeys`` a budget; ``refuses`` one; or carries ``no image``.
        note: What a client should know beyond that.
    """

    effect: Effect
    note: str = ""


_OBEYS, _NO_IMAGE = Route("obeys"), Route("no image")
_PER_PROMPT = Route("obeys", "for each pair of texts or images; a list counts the images of one pair")
_RENDER = Route("obeys", "the features that come out are pruned; send them to `/inference/v1/generate`")
_REFUSED_WITH_FEATURES = (
    "for `content_parts`; `features` are pruned already, so a budget beside them is refused, and counts are read "
    "from them"
)

POST_ROUTES: Mapping[str, Route] = MappingProxyType(
    {
        # generate
        "/v1/chat/completions": _OBEYS,
        "/v1/chat/completions/batch": Route("obeys", "for each conversation; a list counts the images of one"),
        "/v1/completions": Route("no image", "its prompts are text; a bad budget is refused all the same"),
        "/v1/responses": _OBEYS,
        "/v1/messages": _OBEYS,
        "/v1/messages/count_tokens": Route("obeys", "counts what `/v1/messages` takes with the same budget"),
        "/v1/systemone": Route("obeys", "for each question"),
        "/cohere/v2/chat": _OBEYS,
        "/cohere/v2/chat/render": _RENDER,
        "/generative_scoring": _NO_IMAGE,
        "/invocations": Route("obeys", "as the route whose request the body is"),
        # both
        "/tokenize": Route("obeys", "counts what a chat takes with the same budget"),
        "/detokenize": _NO_IMAGE,
        # pooling
        "/pooling": _OBEYS,
        "/classify": _OBEYS,
        "/v1/embeddings": Route("obeys", "for each conversation of a batch"),
        "/v2/embed": Route("obeys", "for each image or input"),
        "/score": _PER_PROMPT,
        "/v1/score": _PER_PROMPT,
        "/rerank": _PER_PROMPT,
        "/v1/rerank": _PER_PROMPT,
        "/v2/rerank": _PER_PROMPT,
        # scale-out
        "/v1/chat/completions/render": _RENDER,
        "/v1/completions/render": _NO_IMAGE,
        "/v1/responses/render": _RENDER,
        "/v1/messages/render": _RENDER,
        "/v1/chat/completions/derender": _NO_IMAGE,
        "/v1/completions/derender": _NO_IMAGE,
        "/inference/v1/generate": Route("obeys", _REFUSED_WITH_FEATURES),
        "/inference/v1/abort_requests": _NO_IMAGE,
        "/abort_requests": _NO_IMAGE,
        # our own
        "/v1/visual_tokens/count": _OBEYS,
        "/v1/visual_tokens/inspect": _OBEYS,
        # no prompts at all
        "/ping": _NO_IMAGE,
        "/scale_elastic_ep": _NO_IMAGE,
        "/is_scaling_elastic_ep": _NO_IMAGE,
        "/v1/responses/{response_id}/cancel": _NO_IMAGE,
        "/v1/load_lora_adapter": _NO_IMAGE,
        "/v1/unload_lora_adapter": _NO_IMAGE,
        "/start_profile": _NO_IMAGE,
        "/stop_profile": _NO_IMAGE,
        "/v1/audio/transcriptions": _NO_IMAGE,
        "/v1/audio/translations": _NO_IMAGE,
    }
)
"""Path -> what a budget does there. Routes without a body (GET, DELETE) can carry no image and are not listed."""

OFFLINE: Mapping[str, Route] = MappingProxyType(
    {
        "LLM.chat": Route(
            "obeys", '`mm_processor_kwargs={"visual_token_budget": 64}`, for all prompts of the call'
        ),
        "LLM.enqueue_chat": Route("obeys", "as `LLM.chat`"),
        "LLM.generate": Route("obeys", "the same argument, or `mm_processor_kwargs` of a prompt"),
        "LLM.enqueue": Route("obeys", "as `LLM.generate`"),
        "LLM.beam_search": Route("obeys", "`mm_processor_kwargs` of a prompt"),
        "LLM.embed": Route("obeys", "`mm_processor_kwargs` of a prompt"),
        "LLM.encode": Route("obeys", "`mm_processor_kwargs` of a prompt"),
        "LLM.classify": Route("obeys", "`mm_processor_kwargs` of a prompt"),
        "LLM.score": Route("obeys", "the default only (`PROMPRUNE_BUDGET`): it takes no processor options"),
        "LLM(...)": Route("refuses", "`mm_processor_kwargs` of the engine: set `PROMPRUNE_BUDGET` instead"),
        "vllm run-batch": Route("obeys", "in the `body` of a line: chat completions, embeddings, score, rerank"),
    }
)
"""Entry point -> what a budget does there, and how it is passed."""
