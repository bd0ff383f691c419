"""Shows which tokens the engine kept of one image: sends a one-token request, then reads the worker's trace.

So the engine does the work, in its own queue and with its own limits. An image whose rows it still has is not
encoded again, and the reply shows the very rows that enter the language model. Then the question is answered.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from promprune_vllm.core import geometry
from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.core.geometry import Box
from promprune_vllm.engine.api_server.inspected_answer import Question
from promprune_vllm.engine.compat import older_minors, parts, verdict
from promprune_vllm.engine.keys import CACHE_SIZE_METHOD, TRACES_METHOD
from promprune_vllm.server.inspect_schemas import Answer, Group, InspectReply, InspectRequest
from promprune_vllm.server.schemas import CacheBytes, Method
from promprune_vllm.server.usage import ImageUsage, current_usage, recording

_EVICTED = (
    "The image's rows left the engine's encoder cache before they could be inspected: the server is busy. "
    "Try again."
)
_ENCODED_ELSEWHERE = (
    "Another engine encoded the image and sent its rows through an encoder cache connector. Only that engine "
    "knows which tokens were kept: inspect the image on the server that encodes."
)
_ONE_TOKEN = {"max_tokens": 1, ESCALATE_FIELD: False}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the engine did with one image.

    Args:
        usage: Of a request with this image alone.
        trace: From the worker, ``{}`` if the image kept every token.
        answer: To the question, if there is one.
    """

    usage: ImageUsage
    trace: Mapping[str, Any]
    answer: Answer | None = None


class Inspector:
    """Answers ``POST /v1/visual_tokens/inspect``, and reports what the engines' encoder caches hold.

    Args:
        engine_client: vLLM's client of its engines; ``None`` on a render server.
        state: The app's state, with vLLM's handler of chat requests.
    """

    def __init__(self, engine_client: Any, state: Any) -> None:
        self._client = engine_client
        self._state = state

    async def run(
        self, body: InspectRequest, question: Question | None, request: Request
    ) -> Inspection | Response:
        """Send an image through the engine.

        Args:
            body: The image, and how to prune it.
            question: How to answer its question; ``None`` for no answer.
            request: The HTTP request.

        Returns:
            What was found, or vLLM's refusal.

        Raises:
            HTTPException: 503 if the image's rows have already been evicted; 501 if the server does not answer
                chat requests or does not encode images.
        """
        _require_part()
        salt = uuid.uuid4().hex
        reply = await self._send(_chat(body, salt, _ONE_TOKEN), request)
        if isinstance(reply, ErrorResponse):
            return JSONResponse(reply.model_dump(), reply.error.code)
        usage = current_usage()
        if usage is None or len(usage.identifiers) != 1:
            raise RuntimeError("the usage of a request with one image does not have one image")
        trace = await self._read_trace(usage.identifiers)
        if not trace and usage.kept < usage.seen:
            raise HTTPException(501, _ENCODED_ELSEWHERE)
        answer = None if question is None else await self._answer(body, question, salt, request)
        if isinstance(answer, ErrorResponse):
            return JSONResponse(answer.model_dump(), answer.error.code)
        return Inspection(usage, trace, answer)

    async def _answer(
        self, body: InspectRequest, question: Question, salt: str, request: Request
    ) -> Answer | ErrorResponse:
        with recording() as usage:
            reply = await self._send(_chat(body, salt, question.first_fields()), request)
        if isinstance(reply, ErrorResponse):
            return reply
        first = question.tried(reply, usage)
        if not question.is_unsure(first):
            return question.answer(first)
        with recording() as usage:
            reply = await self._send(_chat(body, salt, question.second_fields()), request)
        if isinstance(reply, ErrorResponse):
            return reply
        return question.answer(first, (question.tried(reply, usage), usage))

    async def _send(self, chat: Any, request: Request) -> Any:
        """Return vLLM's reply to a chat request."""
        handler = getattr(self._state, "openai_serving_chat", None)
        if handler is None:
            raise HTTPException(501, "This server does not answer chat requests, and the inspector needs one.")
        return await handler.create_chat_completion(chat, request)

    @property
    def capacity_rows(self) -> int:
        """How many rows an engine's encoder cache may hold: at least those of the largest image or video."""
        return int(self._client.input_processor.mm_encoder_cache_size)

    async def cache_sizes(self) -> list[tuple[int, int, tuple[int, int, int] | None]]:
        """Return what each engine's caches hold on its first rank.

        Returns:
            Per engine: images and rows in the encoder cache; and images, bytes and capacity in bytes of the
            feature cache, or ``None`` if it is off.
        """
        engines = await self._call_workers(CACHE_SIZE_METHOD)
        return [(images, rows, stored and tuple(stored)) for (images, rows, stored), *_ in engines]

    async def _call_workers(self, method: str, *arguments: object) -> Any:
        """Call a method of every worker; return a list of engines, each a list with one result per rank."""
        _require_part()
        if self._client is None:
            raise HTTPException(501, "This server only renders prompts: it has no engine.")
        return await older_minors.call_every_engine(
            self._client.engine_core, "collective_rpc", method, None, arguments, None
        )

    async def _read_trace(self, identifiers: Sequence[str]) -> Mapping[str, Any]:
        engines = await self._call_workers(TRACES_METHOD, list(identifiers))  # each rank: one trace per image
        traces = [rank[0] for engine in engines for rank in engine if rank[0] is not None]
        if not traces:
            raise HTTPException(503, _EVICTED, headers={"Retry-After": "1"})
        return max(traces, key=len)  # only the first rank keeps traces; the others return {}


def _require_part() -> None:
    """Raise HTTP 501 if this vLLM has changed what the inspector depends on."""
    changed = verdict.current().moved.get(parts.INSPECTOR.name)
    if changed:
        raise HTTPException(
            501, f"The inspector is off with vLLM {verdict.current().version}, which changed {', '.join(changed)}."
        )


def _chat(body: InspectRequest, salt: str, more: Mapping[str, Any]) -> Any:
    """Return vLLM's chat request about the image, with more fields.

    With a fresh salt, the prefix cache has nothing of it, so the encoder cache must have the image's rows then.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    image: dict[str, Any] = {"url": body.image}
    if body.detail is not None:
        image["detail"] = body.detail
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": image}]
    if body.text:
        content.append({"type": "text", "text": body.text})
    fields = {FIELD: body.visual_token_budget, METHOD_FIELD: body.visual_token_method}
    return ChatCompletionRequest.model_validate(
        {
            "messages": [{"role": "user", "content": content}],
            "cache_salt": salt,
            **{name: value for name, value in fields.items() if value is not None},
            **more,
        }
    )


def reply(
    found: Inspection,
    boxes: Callable[[int, int], Sequence[Box | None]],
    methods: Sequence[Method],
    kv_cache: CacheBytes | None,
) -> InspectReply:
    """Build the reply for one image.

    Args:
        found: What the engine did with it.
        boxes: Returns the pixel boxes of the tokens of an image of a width and height.
        methods: The allowed methods.
        kv_cache: Bytes of KV cache that the image takes and saves.
    """
    usage, trace = found.usage, found.trace
    ((seen, kept),) = usage.images
    (size,) = usage.sizes
    assert size is not None  # only image_embeds have no size
    groups = [_group(part) for part in trace.get("parts", ())]
    visual = sorted(position for group in groups for position in group.kept) if groups else list(range(seen))
    positions = sorted([*visual, *trace.get("newlines", ())])
    token_boxes = boxes(*size)
    if len(token_boxes) != seen or len(positions) != kept:
        raise RuntimeError(
            f"{len(token_boxes)} boxes and {len(positions)} kept positions for an image with {seen} and {kept}"
        )
    method_by_name = {method.name: method for method in methods}
    return InspectReply(
        width=size[0],
        height=size[1],
        seen=seen,
        kept=kept,
        method=method_by_name[trace["method"]] if trace else None,
        boxes=[None if box is None else geometry.rounded(box) for box in token_boxes],
        views=[i for i, box in enumerate(token_boxes) if i == 0 or (box is not None and box[:2] == (0.0, 0.0))],
        indices=positions,
        groups=groups,
        selection_ms=round(1000 * trace["seconds"], 3) if trace else None,
        kv_cache=kv_cache,
        answer=found.answer,
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
