"""Our routes: the server's settings, counts for a budget, cache contents, and inspection of one image."""

from __future__ import annotations

from collections.abc import Sequence
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

    def count(self, sizes: Sequence[tuple[int, int]], budget: object, details: Sequence[str] | None) -> CountReply:
        """Return how many tokens a request would keep.

        Args:
            sizes: Width and height of each image in pixels.
            budget: ``visual_token_budget``, not yet validated.
            details: OpenAI's detail for each image.
        """

    async def caches(self) -> CachesReply:
        """Return what the image caches hold."""

    async def inspect(self, body: InspectRequest, request: Request) -> InspectReply | Response:
        """Return which of an image's tokens are kept, or the engine's error response."""


def router(*, inspector: bool) -> APIRouter:
    """Return the routes; they read the backend from ``app.state.visual_tokens``.

    Args:
        inspector: Whether to add the route that inspects images.
    """
    routes = APIRouter(prefix=PATH, tags=["visual tokens"])
    # Documents our errors; FastAPI would document its own 422 instead.
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"description": "Error in OpenAI's format."}}

    # The first two are plain functions, so that counting does not block the event loop.
    @routes.get("", responses=errors, summary="Model, method and limits in force")
    def visual_tokens(request: Request) -> VisualTokens:
        return _backend(request).state()

    @routes.post("/count", responses=errors, summary="How many tokens a budget keeps of images of given sizes")
    def count(body: CountRequest, request: Request) -> CountReply:
        sizes = [(image.width, image.height) for image in body.images]
        return _backend(request).count(sizes, body.visual_token_budget, body.detail)

    @routes.get("/caches", responses=errors, summary="What the image caches hold right now")
    async def caches(request: Request) -> CachesReply:
        return await _backend(request).caches()

    if inspector:

        @routes.post(
            "/inspect",
            response_model=InspectReply,
            responses=errors,
            summary="Which tokens of an image are kept, and why",
        )
        async def inspect(body: InspectRequest, request: Request) -> InspectReply | Response:
            return await _backend(request).inspect(body, request)

    return routes


def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.visual_tokens
    return backend
