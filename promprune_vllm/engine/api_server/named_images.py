"""Named images: a request gives their uuid instead of sending them.

vLLM's processor cache has such an image from an earlier request, but neither its size nor its pixels. This module
remembers what a budget needs to know about it: its size, and its level for ``"auto"``. Each processor cache has
its own memory, since other API servers and the tokenize routes cache other images.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from promprune_vllm.core.budget import FIELD, IMAGE, METHOD_FIELD, Budget, shown
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.engine.api_server import image_complexity
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan, Plan
from promprune_vllm.errors import BudgetError

MAX_IMAGES = 32_768
"""Images remembered for one cache; each takes less than 500 bytes."""
_SEND_ONCE = (
    f"The server caches it separately for each {FIELD} and {METHOD_FIELD}, and for each text if the method uses "
    "the text. Send the {} itself once, with its uuid and the same fields."
)


class Size(NamedTuple):
    """Size of an image in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class RememberedImage:
    """What is remembered about an image.

    Args:
        size: Width and height, or the shape of a video.
        level: Share of the default that ``"auto"`` kept when the image was last sent with it; ``None`` if it never
            was.
    """

    size: tuple[int, ...]
    level: Fraction | None = None


class ImageMemory:
    """Remembers images by uuid: the ``capacity`` most recently used."""

    def __init__(self, capacity: int = MAX_IMAGES) -> None:
        self._capacity = capacity
        self._images: OrderedDict[bytes, RememberedImage] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, uuid: object) -> RememberedImage | None:
        """Return what is remembered about an image, or ``None``; ``uuid`` may be ``None``."""
        if uuid is None:
            return None
        key = _digest(uuid)
        with self._lock:
            image = self._images.get(key)
            if image is not None:
                self._images.move_to_end(key)
            return image

    def store(self, uuid: object, image: RememberedImage) -> None:
        """Remember an image; above the capacity, forget the least recently used one."""
        key = _digest(uuid)
        with self._lock:
            self._images[key] = image
            self._images.move_to_end(key)
            if len(self._images) > self._capacity:
                self._images.popitem(last=False)


_memories: WeakKeyDictionary[Any, ImageMemory] = WeakKeyDictionary()


def _digest(uuid: object) -> bytes:
    # A client's uuid may have any length, and contain characters that UTF-8 cannot encode.
    return hashlib.blake2b(repr(uuid).encode(), digest_size=16).digest()


SHARED: Literal["shared"] = "shared"
Wish = Budget | None | Literal["shared"]
"""The budget of one image: its own, ``None`` for ``"auto"``, or its part of a total."""


class PromptMedia:
    """The images or the videos of one prompt in order of appearance, with what a budget needs to know about them.

    Args:
        items: vLLM's items; it has ``None`` for a named one.
        uuids: The client's uuid of each, or ``None``.
        cache: vLLM's processor cache, or ``None`` if it is off.
        keys: What each is remembered by, or ``None``; the uuids if left out.
    """

    kind: str

    def __init__(
        self, items: Any, uuids: Sequence[object] | None, cache: Any, keys: Sequence[object] | None = None
    ) -> None:
        count = items.get_count()
        self._items = items
        self._uuids = list(uuids) if uuids else [None] * count
        self._keys = self._uuids if keys is None else list(keys)
        self._memory = None if cache is None else _memories.setdefault(cache, ImageMemory())
        self._remembered = [self._memory.find(key) if self._memory else None for key in self._keys]
        self._levels: list[Fraction | None] = [None] * count
        self._may_lose_tokens = [False] * count

    def get_count(self) -> int:
        """Return the number of images or videos."""
        return len(self._uuids)

    def _is_named(self, index: int) -> bool:
        return self._items.get(index) is None

    @property
    def sizes(self) -> list[Any]:
        """What the number of tokens of each follows from; ``None`` if it is not known."""
        raise NotImplementedError

    @property
    def named_uuids(self) -> dict[int, object]:
        """Index -> uuid of each named one that is remembered."""
        return {i: uuid for i, uuid in enumerate(self._uuids) if self._is_named(i) and self._remembered[i]}

    def decide_levels(
        self, wishes: Sequence[Wish], policy: BudgetPolicy, now: Fraction, *, adapts: bool
    ) -> list[Fraction]:
        """Return the share of the default that ``"auto"`` keeps of each image.

        A named image has the share it had when it was sent: with another one, it would not be in the cache.

        Args:
            wishes: The budget of each image.
            policy: The server's policy.
            now: The level that the load allows.
            adapts: Whether an image's content counts, too. The lower of the two levels applies, not their product.

        Raises:
            BudgetError: It is unknown how many tokens a named image keeps.
        """
        levels = []
        for i, (size, wish) in enumerate(zip(self.sizes, wishes, strict=True)):
            level: Fraction | None = now
            if wish is None:
                level = self._levels[i] = self._level(i, now, adapts=adapts)
            limited = wish == SHARED or not policy.keeps_all(wish, level)
            self._may_lose_tokens[i] = limited
            if (size is None or level is None) and limited and self._is_named(i):
                raise self._unknown_image_error(i)
            levels.append(Fraction(1) if level is None else level)
        return levels

    def _level(self, index: int, now: Fraction, *, adapts: bool) -> Fraction | None:
        remembered = self._remembered[index]
        if not self._is_named(index):
            return min(now, self._content_level(index)) if adapts else now
        if remembered is not None and remembered.level is not None:
            return remembered.level
        return None if adapts else now

    def _content_level(self, index: int) -> Fraction:  # noqa: ARG002
        """Return the share of the default that an image with this content keeps."""
        return Fraction(1)

    def _unknown_image_error(self, index: int) -> BudgetError:
        if self._memory is None:
            why = f"This server caches no {self.kind}s (--mm-processor-cache-gb 0): send the {self.kind} itself."
            return _cache_miss_error(self.kind, index, why)
        why = f"The server does not know enough about uuid {shown(self._uuids[index])} to apply {FIELD}."
        return _cache_miss_error(self.kind, index, f"{why} {_SEND_ONCE.format(self.kind)}")

    def final_plans(self, plans: Sequence[ImagePlan], lengths: Sequence[int]) -> tuple[ImagePlan, ...]:
        """Return the plans corrected by the lengths of the placeholders that vLLM made.

        An image that keeps all its tokens is whatever vLLM's cache has under its uuid. Its length may differ from
        the plan if the uuid is not remembered, or was given to two images.

        Args:
            plans: One per image.
            lengths: Embeddings in each image's placeholder.

        Raises:
            BudgetError: The cached image has another number of tokens than the one that a budget was applied to.
        """
        final = []
        for i, (plan, length) in enumerate(zip(plans, lengths, strict=True)):
            if length != plan.rows and self._may_lose_tokens[i]:
                kind = plan.kind
                raise BudgetError(
                    f"uuid {shown(self._uuids[i])} was given to two {kind}s: the one in the cache has {length} "
                    f"tokens, and {FIELD} was applied to one of {plan.total}. Give each {kind} a uuid of its own.",
                    reason="unsupported",
                )
            final.append(plan if length == plan.rows else replace(plan, total=length, kept=length))
        return tuple(final)

    def remember(self, cached: Sequence[bool]) -> None:
        """Remember those that were sent, now that they are processed.

        Args:
            cached: Which ones were already in the cache. For those, the size of the first one with the key stays.
        """
        for i, (key, size, hit) in enumerate(zip(self._keys, self.sizes, cached, strict=True)):
            if self._memory is not None and key is not None and size is not None and not self._is_named(i):
                remembered, level = self._remembered[i], self._levels[i]
                if level is None and remembered:
                    level = remembered.level
                self._memory.store(key, RememberedImage(remembered.size if remembered and hit else size, level))


class PromptImages(PromptMedia):
    """The images of one prompt; ``items`` are vLLM's ``ImageProcessorItems``."""

    kind = IMAGE

    @property
    def sizes(self) -> list[Size | None]:
        """Width and height of each image; ``None`` for a named image that is not remembered."""
        return [
            None if self._is_named(i) and self._remembered[i] is None else self.get_image_size(i)
            for i in range(self.get_count())
        ]

    def get_image_size(self, index: int) -> Size:
        """Return the width and height of an image that was sent or is remembered."""
        remembered = self._remembered[index]
        if remembered and self._is_named(index):
            return Size(*remembered.size)
        return Size(*self._items.get_image_size(index))

    def _content_level(self, index: int) -> Fraction:
        return image_complexity.level(self._items.get(index))


def require_cached(plan: Plan, kind: str, keys: Sequence[str], cache: Any) -> None:
    """Raise ``BudgetError`` if a named image is remembered, but not in the cache with the requested tokens.

    Args:
        plan: The plan of the prompt's images and videos.
        kind: Which of them.
        keys: Cache key of each.
        cache: vLLM's processor cache.
    """
    for i, uuid in plan.named_uuids.get(kind, {}).items():
        if not cache.is_cached([keys[i]])[0]:
            image = plan.media[kind][i]
            tokens = f"{image.kept} of its {image.total} tokens"
            why = f"With {tokens}, uuid {shown(uuid)} is not or no longer in the cache."
            raise _cache_miss_error(kind, i, f"{why} {_SEND_ONCE.format(kind)}")


def _cache_miss_error(kind: str, index: int, why: str) -> BudgetError:
    # The first sentence is vLLM's own message.
    message = f"Cache miss for {kind} at index {index} but data is not provided. {why}"
    return BudgetError(message, reason="unsupported")
