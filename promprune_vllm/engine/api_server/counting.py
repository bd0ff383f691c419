"""Counts for ``POST /v1/visual_tokens/count``: of images by their sizes, of videos by processing them.

How many tokens a video has, the Hugging Face processor decides. So its prompt is made as for ``/tokenize``: the
video is loaded, sampled and resized under the limits of a chat request, and the engine is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.multimodal.parse import ImageSize

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.engine.api_server.admission import admit, require_prunable
from promprune_vllm.engine.api_server.inspector import ONE_TOKEN, Inspector, chat_request
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.api_server.request_fields import PruningFields
from promprune_vllm.errors import BudgetError
from promprune_vllm.server.schemas import CountRequest
from promprune_vllm.server.usage import recording

Counts = list[tuple[int, int]]
"""Tokens of each image or video before and after pruning."""


class TokenCounter:
    """Counts the tokens that requests would keep.

    Args:
        renderer: vLLM's, with the processor of requests.
        inspector: Processes prompts.
    """

    def __init__(self, renderer: Any, inspector: Inspector) -> None:
        self._renderer = renderer
        self._inspector = inspector
        self._settings = Settings.from_environment()

    async def count(self, body: CountRequest) -> Counts | Response:
        """Return the counts of a request's images or videos, or vLLM's refusal.

        Raises:
            VLLMValidationError: The same as from a request with these images or videos.
        """
        with refusing(None):
            if (body.images is None) == (body.videos is None):
                raise BudgetError(
                    'Send either "images" with their sizes or "videos" with their URLs. /tokenize counts a '
                    "request with both.",
                    param="images",
                )
            if body.videos is not None:
                request = PruningRequest.parse(
                    PruningFields(budget=body.visual_token_budget, method=body.visual_token_method)
                )
                if body.detail is not None:
                    raise BudgetError("detail is for images: leave it out with videos.", param="detail")
                admit(self._renderer, request)
                require_prunable(self._renderer, "count")
        if body.videos is not None:
            fields = {FIELD: body.visual_token_budget, METHOD_FIELD: body.visual_token_method}
            return await self._count_videos(body.videos, fields)
        return await run_in_threadpool(self._count_images, body)

    async def _count_videos(self, urls: Sequence[str], fields: Mapping[str, object]) -> Counts | Response:
        videos = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
        chat = chat_request([*videos, {"type": "text", "text": "?"}], {**fields, **ONE_TOKEN})
        with recording() as usage:
            made = await self._inspector.process(chat)
        if isinstance(made, ErrorResponse):
            return JSONResponse(made.model_dump(), made.error.code)
        return usage.images

    def _count_images(self, body: CountRequest) -> Counts:
        details = body.detail
        with refusing(None):
            honored = tuple(details) if details is not None and self._settings.detail else None
            request = PruningRequest.parse(
                PruningFields(body.visual_token_budget, body.visual_token_method, details=honored)
            )
            sizes = _Sizes([(image.width, image.height) for image in body.images or ()])
            if details is not None and len(details) != sizes.get_count():
                raise BudgetError(
                    f"detail has {len(details)} entries for {sizes.get_count()} images.", param="detail"
                )
            admit(self._renderer, request)
            require_prunable(self._renderer, "count")
            try:
                counts: Counts = self._renderer.mm_processor.count(sizes, request)
            except BudgetError:
                raise
            except ValueError as error:  # such as an aspect ratio that the model does not accept
                raise BudgetError(f"The model takes no images of these sizes: {error}", param="images") from error
        return counts


class _Sizes:
    """Images of which only the sizes are known; enough for the processor to count their tokens."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.sizes = [ImageSize(width=width, height=height) for width, height in sizes]

    def get_count(self) -> int:
        """Return the number of images."""
        return len(self.sizes)

    def get_image_size(self, index: int) -> ImageSize:
        """Return the size of one image."""
        return self.sizes[index]
