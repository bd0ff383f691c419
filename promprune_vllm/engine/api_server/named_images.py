"""Images that a request names by their uuid instead of sending them.

vLLM's processor cache has such an image from an earlier request, but neither its size nor its pixels. What a
budget needs of them is remembered here, beside each processor cache: the size, and the level that ``"auto"`` came
to. The cache of another API server, or of the tokenize routes, has its own images, and so its own memory.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from promprune_vllm.core.budget import FIELD, METHOD_FIELD, BudgetRequest, shown
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.engine.api_server import image_complexity
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan, Plan
from promprune_vllm.errors import BudgetError

MAX_KNOWN = 32_768
"""Images remembered beside one cache; one of them takes less than 500 bytes."""
_ONCE = (
    f"An image is cached for each {FIELD} and {METHOD_FIELD} it is sent with, and for each text where the method "
    "reads the text. Send the image itself once, with its uuid and the same fields."
)


class Size(NamedTuple):
    """Of an image, in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Known:
    """What is remembered of an image.

    Args:
        size: Its width and height.
        level: Share of the default that ``"auto"`` kept when it was last sent so; ``None`` if it never was.
    """

    size: Size
    level: Fraction | None = None


class Memory:
    """What is known of images by uuid: the last ``capacity`` of them that were used."""

    def __init__(self, capacity: int = MAX_KNOWN) -> None:
        self._capacity = capacity
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, uuid: object) -> Known | None:
        """Return what is known of an image; ``None`` of an unknown one, and of one without a name."""
        if uuid is None:
            return None
        key = _digest(uuid)
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
            return known

    def keep(self, uuid: object, known: Known) -> None:
        """Remember an image, and forget the one that was not used for longest where there are too many."""
        key = _digest(uuid)
        with self._lock:
            self._known[key] = known
            self._known.move_to_end(key)
            if len(self._known) > self._capacity:
                self._known.popitem(last=False)


_memories: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()


def _digest(uuid: object) -> bytes:
    # A client's uuid may be of any length, and hold what UTF-8 cannot encode.
    return hashlib.blake2b(repr(uuid).encode(), digest_size=16).digest()


class Images:
    """The images of one prompt, as far as a budget needs to know them: in order of appearance.

    Args:
        items: vLLM's ``ImageProcessorItems``; an image that is not sent is ``None`` there.
        uuids: What the client calls each, ``None`` where it gives no name.
        cache: vLLM's processor cache, or ``None`` where there is none.
    """

    def __init__(self, items: Any, uuids: Sequence[object] | None, cache: Any) -> None:
        count = items.get_count()
        self._items = items
        self._uuids = list(uuids) if uuids else [None] * count
        self._memory = None if cache is None else _memories.setdefault(cache, Memory())
        self._known = [self._memory.find(uuid) if self._memory else None for uuid in self._uuids]
        self._levels: list[Fraction | None] = [None] * count
        self._limited = [False] * count

    def get_count(self) -> int:
        """Return how many there are."""
        return len(self._uuids)

    def get_image_size(self, index: int) -> Size:
        """Return the width and height of an image that was sent, or is known."""
        known = self._known[index]
        return known.size if known and self._is_named(index) else Size(*self._items.get_image_size(index))

    def _is_named(self, index: int) -> bool:
        return self._items.get(index) is None

    @property
    def sizes(self) -> list[Size | None]:
        """Width and height of each; ``None`` of one that is named and not known."""
        return [
            None if self._is_named(i) and self._known[i] is None else self.get_image_size(i)
            for i in range(self.get_count())
        ]

    @property
    def named(self) -> dict[int, object]:
        """The uuid of every image that is named and known, by its place."""
        return {i: uuid for i, uuid in enumerate(self._uuids) if self._is_named(i) and self._known[i]}

    def decide(
        self, budget: BudgetRequest, policy: BudgetPolicy, now: Fraction, *, adapts: bool
    ) -> list[Fraction]:
        """Return the share of the default that ``"auto"`` keeps of each image.

        A named image has the share it had when it was sent: with another, nothing would be found in the cache.

        Args:
            budget: What the request asks for.
            policy: The server's.
            now: What the load allows.
            adapts: Whether an image's own content counts. The lower of the two holds: a plain image has already
                given its part.

        Raises:
            BudgetError: Nobody can say how many tokens a named image keeps.
        """
        budget.check_images(self.get_count())
        found = []
        for i, size in enumerate(self.sizes):
            level: Fraction | None = now
            if budget.total is None and budget.for_image(i) is None:
                level = self._levels[i] = self._level(i, now, adapts=adapts)
            self._limited[i] = budget.total is not None or not policy.keeps_all(budget.for_image(i), level)
            if (size is None or level is None) and self._limited[i]:
                raise self._unknown(i)
            found.append(Fraction(1) if level is None else level)
        return found

    def _level(self, index: int, now: Fraction, *, adapts: bool) -> Fraction | None:
        known = self._known[index]
        if not self._is_named(index):
            return min(now, image_complexity.level(self._items.get(index))) if adapts else now
        if known is not None and known.level is not None:
            return known.level
        return None if adapts else now

    def _unknown(self, index: int) -> BudgetError:
        if self._memory is None:
            return _missed(
                index, "This server caches no images (--mm-processor-cache-gb 0): send the image itself."
            )
        uuid = shown(self._uuids[index])
        return _missed(index, f"Nothing is known of uuid {uuid} that {FIELD} could be applied to. {_ONCE}")

    def settled(self, plans: Sequence[ImagePlan], lengths: Sequence[int]) -> tuple[ImagePlan, ...]:
        """Return what became of the images, whose placeholders are so long.

        Where an image keeps all its tokens, vLLM's cache decides what it is: with a name that nothing is known of,
        or that was given to two images.

        Raises:
            BudgetError: The image in the cache has more tokens than the one that a budget was applied to.
        """
        found = []
        for i, (plan, length) in enumerate(zip(plans, lengths, strict=True)):
            if length != plan.kept and self._limited[i]:
                raise BudgetError(
                    f"uuid {shown(self._uuids[i])} was given to two images: the one in the cache has {length} "
                    f"tokens, and {FIELD} was applied to one of {plan.total}. Give every image a uuid of its own.",
                    reason="unsupported",
                )
            found.append(plan if length == plan.kept else replace(plan, total=length, kept=length))
        return tuple(found)

    def remember(self, cached: Sequence[bool]) -> None:
        """Remember what was sent under a name, now that it is processed.

        Args:
            cached: Which images were in the cache already: there, the first image of a name counts.
        """
        for i, (uuid, hit) in enumerate(zip(self._uuids, cached, strict=True)):
            if self._memory is not None and uuid is not None and not self._is_named(i):
                known, level = self._known[i], self._levels[i]
                size = known.size if known and hit else self.get_image_size(i)
                if level is None and known:
                    level = known.level
                self._memory.keep(uuid, Known(size, level))


def require_cached(plan: Plan, keys: Sequence[str], cache: Any) -> None:
    """Raise ``BudgetError`` for an image that is named and known, but not cached as it is asked for.

    Args:
        plan: What is to happen to the prompt's images.
        keys: What each is called in the cache.
        cache: vLLM's processor cache.
    """
    for i, uuid in plan.named.items():
        if not cache.is_cached([keys[i]])[0]:
            image = plan.images[i]
            tokens = f"{image.kept} of its {image.total} tokens"
            raise _missed(i, f"With {tokens}, uuid {shown(uuid)} is not in the cache, or not any more. {_ONCE}")


def _missed(index: int, why: str) -> BudgetError:
    # Begins with vLLM's own words.
    words = f"Cache miss for image at index {index} but data is not provided. {why}"
    return BudgetError(words, reason="unsupported")
