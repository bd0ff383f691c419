"""Adds ``x-visual-tokens-seen`` and ``x-visual-tokens-kept`` to every reply to a request with images or videos."""

from __future__ import annotations

from typing import TYPE_CHECKING

from promprune_vllm.server.usage import recording

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SEEN_HEADER = "x-visual-tokens-seen"
KEPT_HEADER = "x-visual-tokens-kept"


class VisualTokenHeaders:
    """ASGI middleware that adds the visual token counts of a request's images and videos to the reply headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with recording() as current:

            async def send_with_headers(message: Message) -> None:
                if message["type"] == "http.response.start" and current.images:
                    counts = ((SEEN_HEADER, current.seen), (KEPT_HEADER, current.kept))
                    extra = [(name.encode(), str(count).encode()) for name, count in counts]
                    message = {**message, "headers": [*message.get("headers", ()), *extra]}
                await send(message)

            await self.app(scope, receive, send_with_headers)
