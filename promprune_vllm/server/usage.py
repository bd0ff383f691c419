"""Visual token counts of the request being handled, for its reply.

The counts become known deep inside request handling, and the middleware outside needs them for the reply. Both
use a context variable that the middleware sets for each request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

USAGE_FIELD = "visual_tokens"


@dataclass(slots=True)
class ImageUsage:
    """The images of one HTTP request, in order of appearance.

    Args:
        images: ``(seen, kept)`` of each image.
        identifiers: Their keys in the engine's caches.
        sizes: Width and height of each in pixels; ``None`` for an image that was sent as embeddings.
    """

    images: list[tuple[int, int]] = field(default_factory=list)
    identifiers: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """Visual tokens before pruning."""
        return sum(seen for seen, _ in self.images)

    @property
    def kept(self) -> int:
        """Visual tokens that entered the language model."""
        return sum(kept for _, kept in self.images)

    def usage(self) -> dict[str, Any]:
        """Return a reply's ``usage.visual_tokens``."""
        images = [{"seen": seen, "kept": kept} for seen, kept in self.images]
        return {"seen": self.seen, "kept": self.kept, "images": images}


_usage: ContextVar[ImageUsage | None] = ContextVar("visual_token_usage", default=None)


def record_images(
    images: Sequence[tuple[int, int]],
    identifiers: Sequence[str] = (),
    sizes: Sequence[tuple[int, int] | None] = (),
) -> None:
    """Add images to the usage of the request being handled (see ``ImageUsage``); outside of one, do nothing."""
    current = _usage.get()
    if current is not None:
        current.images.extend(images)
        current.identifiers.extend(identifiers)
        current.sizes.extend(sizes)


def current_usage() -> ImageUsage | None:
    """Return the usage of the request being handled, or ``None`` if it has no images."""
    current = _usage.get()
    return current if current is not None and current.images else None


@contextmanager
def recording() -> Iterator[ImageUsage]:
    """Record the images of the request that is handled in this block."""
    current = ImageUsage()
    token = _usage.set(current)
    try:
        yield current
    finally:
        _usage.reset(token)
