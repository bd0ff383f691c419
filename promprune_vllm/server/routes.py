"""Our routes: what the server does to images, what a budget keeps of some or of one, and what caches hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import Response

from promprune_vllm.server.inspect_schemas import InspectReply, InspectRequest
from promprune_vllm.server.schemas import CachesReply, CountReply, CountRequest, VisualTokens

PATH = "/v1/visual_tokens"
"""Below /v1, where the server asks for its API key."""


class Backend(Protocol):
    """What the routes need of the engine's side."""

    def state(self) -> VisualTokens:
        """Return what is in force."""

    def count(self, sizes: Sequence[tuple[int, int]], budget: object, details: Sequence[str] | None) -> CountReply:
        """Return what a request would keep.

        Args:
            sizes: Width and height of each image in pixels.
            budget: ``visual_token_budget``, unchecked.
            details: OpenAI's detail of each image.
        """

    async def caches(self) -> CachesReply:
        """Return what the caches of images hold."""

    async def inspect(self, body: InspectRequest, request: Request) -> InspectReply | Response:
        """Return what became of an image, or the engine's refusal."""


def router(*, inspector: bool) -> APIRouter:
    """Return the routes; they find the backend in the app's state, as ``visual_tokens``.

    Args:
        inspector: Whether images may be inspected.
    """
    routes = APIRouter(prefix=PATH, tags=["visual tokens"])
    # For the document, which would promise FastAPI's own 422 otherwise.
    refused: dict[int | str, dict[str, Any]] = {"4XX": {"description": "Refused, in OpenAI's form of errors."}}

    # The first two are plain functions, so that counting does not hold up the event loop.
    @routes.get("", responses=refused, summary="Model, method and limits in force")
    def visual_tokens(request: Request) -> VisualTokens:
        return _backend(request).state()

    @routes.post("/count", responses=refused, summary="What a budget keeps of images of such sizes")
    def count(body: CountRequest, request: Request) -> CountReply:
        sizes = [(image.width, image.height) for image in body.images]
        return _backend(request).count(sizes, body.visual_token_budget, body.detail)

    @routes.get("/caches", responses=refused, summary="What the caches of images hold at this moment")
    async def caches(request: Request) -> CachesReply:
        return await _backend(request).caches()

    if inspector:

        @routes.post(
            "/inspect", response_model=InspectReply, responses=refused, summary="What is kept of an image, and why"
        )
        async def inspect(body: InspectRequest, request: Request) -> InspectReply | Response:
            return await _backend(request).inspect(body, request)

    return routes


def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.visual_tokens
    return backend
