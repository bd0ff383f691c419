"""Our routes: the server's settings, counts for a budget, cache contents, inspection of an image or a video."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import Response

from promprune_vllm.server.inspect_schemas import InspectReply, InspectRequest
from promprune_vllm.server.schemas import CachesReply, CountReply, CountRequest, VisualTokens

PATH = "/v1/visual_tokens"
"""Below /v1, where vLLM requires the API key."""


class Backend(Protocol):
    """What the routes need from the engine."""

    def state(self) -> VisualTokens:
        """Return the model, methods and limits in force."""

    async def count(self, body: CountRequest) -> CountReply | Response:
        """Return how many tokens a request would keep, or vLLM's refusal of its videos."""

    async def caches(self) -> CachesReply:
        """Return what the image caches hold."""

    async def inspect(self, body: InspectRequest, request: Request) -> InspectReply | Response:
        """Return which tokens of an image or a video are kept, or the engine's error response."""


def router(*, inspector: bool) -> APIRouter:
    """Return the routes; they read the backend from ``app.state.visual_tokens``.

    Args:
        inspector: Whether to add the route that inspects images.
    """
    routes = APIRouter(prefix=PATH, tags=["visual tokens"])
    # Documents our errors; FastAPI would document its own 422 instead.
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"description": "Error in OpenAI's format."}}

    @routes.get("", responses=errors, summary="Model, method and limits in force")
    def visual_tokens(request: Request) -> VisualTokens:
        return _backend(request).state()

    @routes.post(
        "/count",
        response_model=CountReply,
        responses=errors,
        summary="How many tokens a budget keeps of images of given sizes, or of videos",
    )
    async def count(body: CountRequest, request: Request) -> CountReply | Response:
        return await _backend(request).count(body)

    @routes.get("/caches", responses=errors, summary="What the image caches hold right now")
    async def caches(request: Request) -> CachesReply:
        return await _backend(request).caches()

    if inspector:

        @routes.post(
            "/inspect",
            response_model=InspectReply,
            responses=errors,
            summary="Which tokens of an image or a video are kept, and why",
        )
        async def inspect(body: InspectRequest, request: Request) -> InspectReply | Response:
            return await _backend(request).inspect(body, request)

    return routes


def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.visual_tokens
    return backend
