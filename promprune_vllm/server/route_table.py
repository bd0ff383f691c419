"""What our fields do on every route of vLLM's HTTP servers, and in every offline entry point.

The OpenAPI document, docs/requests.md and tests are built from it. A test walks the OpenAPI document of each kind
of server and fails on a route that is missing here.
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
        effect: Whether it ``obeys`` a budget, ``refuses`` one, or has ``no image`` to prune.
        note: Anything else a client should know.
        asks_again: Whether it takes ``visual_token_escalate``: it answers, or counts the tokens of such a request.
    """

    effect: Effect
    note: str = ""
    asks_again: bool = False


_OBEYS, _ANSWERS, _NO_IMAGE = Route("obeys"), Route("obeys", asks_again=True), Route("no image")
_PER_PROMPT = Route(
    "obeys", "applies to each pair of texts or images; a list has one entry per image or video of it"
)
_RENDER = Route("obeys", "returns pruned features; send them to `/inference/v1/generate`")
_REFUSED_WITH_FEATURES = (
    "applies to `content_parts`; `features` are already pruned, so a budget next to them is refused, and counts "
    "are read from them"
)

POST_ROUTES: Mapping[str, Route] = MappingProxyType(
    {
        # generate
        "/v1/chat/completions": _ANSWERS,
        "/v1/chat/completions/batch": Route(
            "obeys",
            "applies to each conversation; a list has one entry per image or video of it",
            asks_again=True,
        ),
        "/v1/completions": Route(
            "no image", "prompts are text only; an invalid budget is still refused", asks_again=True
        ),
        "/v1/responses": _ANSWERS,
        "/v1/messages": _ANSWERS,
        "/v1/messages/count_tokens": Route(
            "obeys", "counts what `/v1/messages` uses with the same budget", asks_again=True
        ),
        "/v1/systemone": Route("obeys", "applies to each question"),
        "/cohere/v2/chat": _ANSWERS,
        "/cohere/v2/chat/render": _RENDER,
        "/generative_scoring": _NO_IMAGE,
        "/invocations": Route("obeys", "same as the route that the body is a request for", asks_again=True),
        # both
        "/tokenize": Route("obeys", "counts what a chat uses with the same budget", asks_again=True),
        "/detokenize": _NO_IMAGE,
        # pooling
        "/pooling": _OBEYS,
        "/classify": _OBEYS,
        "/v1/embeddings": Route("obeys", "applies to each conversation of a batch"),
        "/v2/embed": Route("obeys", "applies to each image or input"),
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
        "/inference/v1/generate": Route("obeys", _REFUSED_WITH_FEATURES, asks_again=True),
        "/inference/v1/abort_requests": _NO_IMAGE,
        "/abort_requests": _NO_IMAGE,
        # ours
        "/v1/visual_tokens/count": _OBEYS,
        "/v1/visual_tokens/inspect": _ANSWERS,
        # no prompts
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
"""Path -> what a budget does there. Routes without a body (GET, DELETE) cannot have images and are not listed."""

OFFLINE: Mapping[str, Route] = MappingProxyType(
    {
        "LLM.chat": Route(
            "obeys", '`mm_processor_kwargs={"visual_token_budget": 64}`, applies to all prompts of the call'
        ),
        "LLM.enqueue_chat": Route("obeys", "same as `LLM.chat`"),
        "LLM.generate": Route("obeys", "the same argument, or `mm_processor_kwargs` of a prompt"),
        "LLM.enqueue": Route("obeys", "same as `LLM.generate`"),
        "LLM.beam_search": Route("obeys", "`mm_processor_kwargs` of a prompt"),
        "LLM.embed": Route("obeys", "`mm_processor_kwargs` of a prompt"),
        "LLM.encode": Route("obeys", "`mm_processor_kwargs` of a prompt"),
        "LLM.classify": Route("obeys", "`mm_processor_kwargs` of a prompt"),
        "LLM.score": Route("obeys", "only the default (`PROMPRUNE_BUDGET`): it takes no processor options"),
        "LLM(...)": Route("refuses", "engine-wide `mm_processor_kwargs`: set `PROMPRUNE_BUDGET` instead"),
        "vllm run-batch": Route(
            "obeys", "in the `body` of a line: chat completions, embeddings, score, rerank", asks_again=True
        ),
    }
)
"""Entry point -> what a budget does there, and how it is passed."""
