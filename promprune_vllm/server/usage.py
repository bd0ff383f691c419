"""Visual token counts of the request being handled, for its reply.

The counts become known deep inside request handling, and the middleware outside needs them for the reply. Both
use a context variable that the middleware sets for each request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

from promprune_vllm.core.budget import IMAGE, VIDEO

USAGE_FIELD = "visual_tokens"


@dataclass(frozen=True, slots=True)
class FirstTry:
    """The first answer to a prompt that may be answered again.

    Args:
        confidence: Lowest probability of a likeliest token among its first tokens.
        asked_again: Whether it was thrown away for the answer of a second try. Only then, the rest is told.
        kept: Visual tokens of the first try.
        prompt_tokens: Tokens of its prompt.
        completion_tokens: Tokens of its answer that were generated before it was thrown away.
    """

    confidence: float
    asked_again: bool = False
    kept: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def usage(self) -> dict[str, Any]:
        """Return its entry in a reply's usage."""
        fields = asdict(self) if self.asked_again else {"confidence": self.confidence, "asked_again": False}
        return {**fields, "confidence": round(self.confidence, 6)}


@dataclass(slots=True)
class ImageUsage:
    """The images and videos of one HTTP request, in order of appearance.

    Args:
        images: ``(seen, kept)`` of each image or video.
        identifiers: Their keys in the engine's caches.
        sizes: Width and height of each in pixels; ``None`` for one that was sent as embeddings.
        kinds: ``IMAGE`` or ``VIDEO`` for each.
        first_tries: Of the prompts whose answer may be asked for again, in the order in which they were decided.
        second_lengths: Placeholder tokens by modality of a prompt that was asked again; empty if none was.
    """

    images: list[tuple[int, int]] = field(default_factory=list)
    identifiers: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    first_tries: list[FirstTry] = field(default_factory=list)
    second_lengths: Mapping[str, int] = field(default_factory=dict)

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
        usage: dict[str, Any] = {"seen": self.seen, "kept": self.kept, "images": self._counts(IMAGE)}
        if VIDEO in self.kinds:
            usage["videos"] = self._counts(VIDEO)
        if self.first_tries:
            usage["first_tries"] = [each.usage() for each in self.first_tries]
        return usage

    def _counts(self, kind: str) -> list[dict[str, int]]:
        counts = zip(self.images, self.kinds, strict=True)
        return [{"seen": seen, "kept": kept} for (seen, kept), each in counts if each == kind]


_usage: ContextVar[ImageUsage | None] = ContextVar("visual_token_usage", default=None)


def record_images(
    images: Sequence[tuple[int, int]],
    identifiers: Sequence[str] = (),
    sizes: Sequence[tuple[int, int] | None] = (),
    at: int | None = None,
    kinds: Sequence[str] = (),
) -> int:
    """Add images and videos to the usage of the request being handled; outside of one, do nothing.

    Args:
        images: ``(seen, kept)`` of each image or video, in order of appearance.
        identifiers: Their keys in the engine's caches.
        sizes: Width and height of each.
        at: Where the images are that these replace, if they do.
        kinds: ``IMAGE`` or ``VIDEO`` for each; all are images if left out.

    Returns:
        The index of the first of them.
    """
    current = _usage.get()
    if current is None:
        return 0
    start = len(current.images) if at is None else at
    place = slice(start, start + len(images))
    current.images[place], current.identifiers[place], current.sizes[place] = images, identifiers, sizes
    current.kinds[place] = kinds or [IMAGE] * len(images)
    return start


def record_first_try(first: FirstTry, second_lengths: Mapping[str, int] | None = None) -> None:
    """Add a first try to the usage of the request being handled; outside of one, do nothing.

    Args:
        first: The try.
        second_lengths: Placeholder tokens by modality of the second try, if there is one.
    """
    current = _usage.get()
    if current is not None:
        current.first_tries.append(first)
        current.second_lengths = second_lengths or {}


def current_usage() -> ImageUsage | None:
    """Return the usage of the request being handled, or ``None`` if it has neither images nor videos."""
    current = _usage.get()
    return current if current is not None and current.images else None


@contextmanager
def recording() -> Iterator[ImageUsage]:
    """Record the images and videos of the request that is handled in this block."""
    current = ImageUsage()
    token = _usage.set(current)
    try:
        yield current
    finally:
        _usage.reset(token)
