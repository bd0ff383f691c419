"""What the engine kept of one image: a request of one token goes through, and the worker tells what it remembers.

So the engine does the work, in its own queue and with its own limits; an image whose rows it still has is not
encoded again, and what is shown are the very rows that enter the language model.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from promprune_vllm.core import geometry
from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.core.geometry import Box
from promprune_vllm.engine.compat import older_minors
from promprune_vllm.engine.keys import HELD, RECALL
from promprune_vllm.server.inspect_schemas import Group, InspectReply, InspectRequest
from promprune_vllm.server.schemas import CacheBytes, Method
from promprune_vllm.server.usage import ImageUsage, current_usage

_GONE = (
    "The image's rows had left the engine's encoder cache before they could be looked at: the server is busy. "
    "Try again."
)
_FROM_ELSEWHERE = (
    "The image's rows came to this engine from another one, through a connector of encoder caches, and what was "
    "kept of them is known only there: inspect the image on the server that encodes."
)


class Inspector:
    """Answers ``POST /v1/visual_tokens/inspect``, and what the engines' encoder caches hold.

    Args:
        engine_client: vLLM's, with the engines behind it.
        state: The app's, with vLLM's handler of chat requests.
    """

    def __init__(self, engine_client: Any, state: Any) -> None:
        self._client = engine_client  # a render server has none
        self._state = state

    async def run(self, body: InspectRequest, request: Request) -> tuple[ImageUsage, Mapping[str, Any]] | Response:
        """Have an image pruned.

        Returns:
            What the processor told of it and what the worker remembers, ``{}`` if it kept every token; or vLLM's
            refusal.

        Raises:
            HTTPException: 503, the image's rows are gone already; 501, the server does not chat or
                does not encode.
        """
        handler = getattr(self._state, "openai_serving_chat", None)
        if handler is None:
            raise HTTPException(501, "This server does not answer chat requests, which inspecting goes through.")
        reply = await handler.create_chat_completion(_chat(body), request)
        if isinstance(reply, ErrorResponse):
            return JSONResponse(reply.model_dump(), reply.error.code)
        known = current_usage()
        if known is None or len(known.identifiers) != 1:
            raise RuntimeError("a request with one image was told of without it")
        trace = await self._recalled(known.identifiers)
        if not trace and known.kept < known.seen:
            raise HTTPException(501, _FROM_ELSEWHERE)
        return known, trace

    @property
    def capacity_rows(self) -> int:
        """How many rows vLLM lets an engine's encoder cache hold: those of the largest image or video at least."""
        return int(self._client.input_processor.mm_encoder_cache_size)

    async def held(self) -> list[tuple[int, int]]:
        """Return how many images each engine's encoder cache holds, and how many rows; of its first rank."""
        engines = await self._asked(HELD)
        return [(images, rows) for (images, rows), *_ in engines]

    async def _asked(self, method: str, *arguments: object) -> Any:
        """Ask every worker: one list for each engine, in it one entry for each rank."""
        if self._client is None:
            raise HTTPException(501, "This server only renders prompts: it has no engine that could tell.")
        return await older_minors.call_every_engine(
            self._client.engine_core, "collective_rpc", method, None, arguments, None
        )

    async def _recalled(self, identifiers: Sequence[str]) -> Mapping[str, Any]:
        engines = await self._asked(RECALL, list(identifiers))  # of each rank, one entry for each image
        found = [rank[0] for engine in engines for rank in engine if rank[0] is not None]
        if not found:
            raise HTTPException(503, _GONE, headers={"Retry-After": "1"})
        return max(found, key=len)  # only the first rank remembers anything


def _chat(body: InspectRequest) -> ChatCompletionRequest:
    image: dict[str, Any] = {"url": body.image}
    if body.detail is not None:
        image["detail"] = body.detail
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": image}]
    if body.text:
        content.append({"type": "text", "text": body.text})
    asked = {FIELD: body.visual_token_budget, METHOD_FIELD: body.visual_token_method}
    return ChatCompletionRequest.model_validate(
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            # No prefix is shared, so the image's rows are looked up in the encoder cache, or made.
            "cache_salt": uuid.uuid4().hex,
            **{name: value for name, value in asked.items() if value is not None},
        }
    )


def reply(
    known: ImageUsage,
    trace: Mapping[str, Any],
    boxes: Callable[[int, int], Sequence[Box | None]],
    methods: Sequence[Method],
    kv_cache: CacheBytes | None,
) -> InspectReply:
    """Put together what is shown of an image."""
    ((seen, kept),) = known.images
    (size,) = known.sizes
    assert size is not None  # it came as a picture
    groups = [_group(part) for part in trace.get("parts", ())]
    places = sorted(place for group in groups for place in group.kept) if groups else list(range(seen))
    rows = sorted([*places, *trace.get("newlines", ())])
    looks = boxes(*size)
    if len(looks) != seen or len(rows) != kept:
        raise RuntimeError(f"{len(looks)} places, {len(rows)} kept rows: {seen} and {kept} were counted")
    named = {method.name: method for method in methods}
    return InspectReply(
        width=size[0],
        height=size[1],
        seen=seen,
        kept=kept,
        method=named[trace["method"]] if trace else None,
        boxes=[None if box is None else geometry.rounded(box) for box in looks],
        views=[i for i, box in enumerate(looks) if i == 0 or (box is not None and box[:2] == (0.0, 0.0))],
        indices=rows,
        groups=groups,
        selection_ms=round(1000 * trace["seconds"], 3) if trace else None,
        kv_cache=kv_cache,
    )


def _group(part: Mapping[str, Any]) -> Group:
    report = part["report"]
    entropy = next((value for name, value in report.items() if name.endswith("_entropy")), None)
    return Group(
        tokens=part["positions"],
        kept=part["kept"],
        salient=part["salient"],
        saliency=None if part["saliency"] is None else [float(f"{value:.6g}") for value in part["saliency"]],
        entropy=entropy,
        report=report,
    )
