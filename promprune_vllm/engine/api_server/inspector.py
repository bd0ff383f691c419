"""Shows which tokens the engine kept of an image or a video: sends a one-token request, then reads the trace.

So the engine does the work, in its own queue and with its own limits. An image whose rows it still has is not
encoded again, and the reply shows the very rows that enter the language model. Then the question is answered.
What the model gets of a video, only the processor knows: its prompt is processed once more, as ``/tokenize`` does.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from promprune_vllm.core.budget import FIELD, IMAGE, METHOD_FIELD, VIDEO
from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.engine.api_server.audit import never_drawn
from promprune_vllm.engine.api_server.inspected_answer import Question
from promprune_vllm.engine.api_server.seen_frames import SeenFrames
from promprune_vllm.engine.compat import feature_cache, older_minors, parts, verdict
from promprune_vllm.engine.keys import CACHE_SIZE_METHOD, TRACES_METHOD
from promprune_vllm.server.inspect_schemas import Answer, InspectRequest
from promprune_vllm.server.usage import ImageUsage, current_usage, recording

_EVICTED = (
    "The image's rows left the engine's encoder cache before they could be inspected: the server is busy. "
    "Try again."
)
_ENCODED_ELSEWHERE = (
    "Another engine encoded the image and sent its rows through an encoder cache connector. Only that engine "
    "knows which tokens were kept: inspect the image on the server that encodes."
)
_CHANGED = (
    "The video at this URL changed between two loads: its frames are not those that the engine pruned. Try again, "
    "or send the video itself in a data: URL."
)
ONE_TOKEN = {"max_tokens": 1, ESCALATE_FIELD: False}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the engine did with one image or video.

    Args:
        usage: Of a request with it alone.
        trace: From the worker, ``{}`` if every token was kept.
        answer: To the question, if there is one.
        frames: Of a video.
    """

    usage: ImageUsage
    trace: Mapping[str, Any]
    answer: Answer | None = None
    frames: SeenFrames | None = None


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
        """Send an image or a video through the engine.

        Args:
            body: The image or video, and how to prune it.
            question: How to answer its question; ``None`` for no answer.
            request: The HTTP request.

        Returns:
            What was found, or vLLM's refusal.

        Raises:
            HTTPException: 503 if the image's rows have already been evicted; 409 if another video is at the URL
                now; 501 if the server does not answer chat requests or does not encode images.
        """
        _require_part()
        salt = uuid.uuid4().hex
        reply = await self._send(_chat(body, salt, ONE_TOKEN), request)
        if isinstance(reply, ErrorResponse):
            return JSONResponse(reply.model_dump(), reply.error.code)
        usage = current_usage()
        if usage is None or len(usage.identifiers) != 1:
            raise RuntimeError("the usage of a request with one image does not have one image")
        trace = await self._read_trace(usage.identifiers)
        if not trace and usage.kept < usage.seen:
            raise HTTPException(501, _ENCODED_ELSEWHERE)
        frames = None if body.video is None else await self._seen_frames(_chat(body, salt, ONE_TOKEN), usage)
        answer = None if question is None else await self._answer(body, question, salt, request)
        for each in (frames, answer):
            if isinstance(each, ErrorResponse):
                return JSONResponse(each.model_dump(), each.error.code)
        return Inspection(usage, trace, answer, frames)

    async def _seen_frames(self, chat: Any, usage: ImageUsage) -> SeenFrames | ErrorResponse:
        """Return the frames of the video of a chat request, which is loaded a second time for that.

        Args:
            chat: The request.
            usage: Of the same request when the engine had it.
        """
        with recording() as again:
            made = await self.process(chat)
        if isinstance(made, ErrorResponse):
            return made
        renderer = self._state.online_renderer.renderer
        # The cache's key depends on the tokens that are kept, and these on the load if the budget does.
        comparable = again.images == usage.images and feature_cache.hashes_media(renderer.config)
        if again.seen != usage.seen or (comparable and again.identifiers != usage.identifiers):
            raise HTTPException(409, _CHANGED)
        (item,) = made["mm_kwargs"][VIDEO]
        frames: SeenFrames = await asyncio.to_thread(renderer.mm_processor.seen_frames, item)
        return frames

    async def process(self, chat: Any) -> Any:
        """Return what vLLM makes of a chat request's prompt, or its refusal; the engine is not asked."""
        _require_part()
        made = await self._state.online_renderer.render_chat(chat, skip_mm_cache=True)
        return made if isinstance(made, ErrorResponse) else made[1][0]

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
        with never_drawn():
            return await handler.create_chat_completion(chat, request)

    @property
    def has_engine(self) -> bool:
        """Whether it is no render server."""
        return self._client is not None

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
    """Return vLLM's chat request about the image or video, with more fields.

    With a fresh salt, the prefix cache has nothing of it, so the encoder cache must have the image's rows then.
    """
    kind, url = (IMAGE, body.image) if body.video is None else (VIDEO, body.video)
    medium = {"url": url} if body.detail is None else {"url": url, "detail": body.detail}
    content: list[dict[str, Any]] = [{"type": f"{kind}_url", f"{kind}_url": medium}]
    if body.text:
        content.append({"type": "text", "text": body.text})
    fields = {FIELD: body.visual_token_budget, METHOD_FIELD: body.visual_token_method}
    return chat_request(content, {"cache_salt": salt, **fields, **more})


def chat_request(content: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> Any:
    """Return vLLM's chat request with one message.

    Args:
        content: The parts of the message.
        fields: Further fields; those that are ``None`` are left out.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    sent = {name: value for name, value in fields.items() if value is not None}
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": [*content]}], **sent})
