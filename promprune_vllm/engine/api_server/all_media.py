"""All images and videos of a prompt in order of appearance: vLLM has the images and the videos apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems

from promprune_vllm.core.budget import FIELD, IMAGE, BudgetRequest
from promprune_vllm.core.policy import BudgetPolicy, MediaPolicy
from promprune_vllm.engine.api_server.named_images import SHARED, PromptMedia, Wish
from promprune_vllm.errors import BudgetError

Place = tuple[str, int]
"""``IMAGE`` or ``VIDEO``, and the index among those of this kind."""
T = TypeVar("T")


class EncodedMedia(PromptMedia):
    """Images or videos that were sent as embeddings, which keep all their tokens."""

    @property
    def sizes(self) -> list[None]:
        """Unknown."""
        return [None] * self.get_count()

    @property
    def named_uuids(self) -> dict[int, object]:
        """None is."""
        return {}

    def decide_levels(
        self,
        wishes: Sequence[Wish],
        policy: BudgetPolicy,  # noqa: ARG002
        now: Fraction,
        *,
        adapts: bool,  # noqa: ARG002
    ) -> list[Fraction]:
        """Return what says nothing about them."""
        return [now] * len(wishes)


def is_encoded(items: Any) -> bool:
    """Return whether images or videos were sent as embeddings."""
    return isinstance(items, (EmbeddingItems, DictEmbeddingItems))


class Counted(NamedTuple):
    """An image or a video with its counts.

    Args:
        kind: ``IMAGE`` or ``VIDEO``.
        size: Width and height in pixels, or a ``VideoShape``; ``None`` if unknown.
        total: Tokens before pruning.
        kept: Tokens after pruning.
    """

    kind: str
    size: Any
    total: int
    kept: int


class AllMedia:
    """The images and videos of one prompt.

    Args:
        media: Those of each kind.
        order: All of them, in order of appearance.
    """

    def __init__(self, media: Mapping[str, PromptMedia], order: Sequence[Place]) -> None:
        self._media = media
        self._order = order
        self.kinds = [kind for kind, _ in order]
        """``IMAGE`` or ``VIDEO`` of each."""

    @property
    def sizes(self) -> list[Any]:
        """Of each; see ``Counted``."""
        sizes = {kind: each.sizes for kind, each in self._media.items()}
        return [sizes[kind][i] for kind, i in self._order]

    @property
    def frames(self) -> list[int]:
        """Frames of each video; 1 for images, and where they are not known."""
        return [getattr(size, "frames", 1) for size in self.sizes]

    @property
    def pixels(self) -> list[tuple[int, int] | None]:
        """Width and height of each image; ``None`` for videos and where they are not known."""
        return [size if kind == IMAGE else None for kind, size in zip(self.kinds, self.sizes, strict=True)]

    @property
    def images(self) -> PromptMedia | None:
        """The images, if there are any."""
        return self._media.get(IMAGE)

    def decide_levels(
        self, budget: BudgetRequest, policy: MediaPolicy, now: Mapping[str, Fraction], *, adapts: bool
    ) -> list[Fraction]:
        """Return the share of the default that ``"auto"`` keeps of each.

        Args:
            budget: The request's budget.
            policy: The server's policy.
            now: The level that load and target allow, by kind.
            adapts: Whether an image's content counts, too.

        Raises:
            BudgetError: It is unknown how many tokens a named image or video keeps.
        """
        shared = budget.total is not None
        wishes = self.by_kind(
            SHARED if shared else budget.for_medium(n, kind) for n, kind in enumerate(self.kinds)
        )
        levels = {
            kind: each.decide_levels(wishes[kind], policy.of(kind), now[kind], adapts=adapts and kind == IMAGE)
            for kind, each in self._media.items()
        }
        return [levels[kind][i] for kind, i in self._order]

    def count(self, tokens: Callable[[PromptMedia, int], int]) -> list[int]:
        """Return the tokens of each before pruning; 1 where they are not known, of what keeps all its tokens.

        Args:
            tokens: Counts those of an image, given all images and its index.
        """
        totals = []
        for (kind, i), size in zip(self._order, self.sizes, strict=True):
            known = size.total if kind != IMAGE and size else None
            totals.append(1 if size is None else known or tokens(self._media[kind], i))
        return totals

    def by_kind(self, values: Iterable[T]) -> dict[str, tuple[T, ...]]:
        """Return one value of each image and video by kind, in the order that vLLM has them."""
        of_place = dict(zip(self._order, values, strict=True))
        return {
            kind: tuple(of_place[kind, i] for i in range(each.get_count())) for kind, each in self._media.items()
        }

    def refuse_encoded(self) -> None:
        """Raise ``BudgetError`` if any was sent as embeddings."""
        for kind, each in self._media.items():
            if isinstance(each, EncodedMedia):
                raise BudgetError(
                    f"{FIELD} cannot be applied to {kind}_embeds: they are already encoded. Send the {kind} "
                    f"itself, or leave {FIELD} out.",
                    reason="unsupported",
                )


def order_in_prompt(
    prompt: str | list[int], counts: Mapping[str, int], placeholders: Mapping[str, str], decode: Callable[..., str]
) -> list[Place] | None:
    """Return the images and videos in order of appearance; ``None`` if the prompt does not tell.

    Args:
        prompt: Text or tokens, before an image or a video has as many tokens as it takes.
        counts: How many there are of each kind.
        placeholders: What stands for one of each kind in the prompt.
        decode: Turns tokens into text.
    """
    text = prompt if isinstance(prompt, str) else decode(prompt, skip_special_tokens=False)
    kinds = {placeholders[kind]: kind for kind in counts}
    found = [kinds[match] for match in re.findall("|".join(map(re.escape, kinds)), text)]
    if any(found.count(kind) != count for kind, count in counts.items()):
        return None
    return [(kind, found[:n].count(kind)) for n, kind in enumerate(found)]


def order_of_ranges(ranges: Mapping[str, Sequence[Any]]) -> list[Place]:
    """Return the images and videos of a processed prompt in order of appearance.

    Args:
        ranges: vLLM's ``PlaceholderRange`` of each, by kind.
    """
    places = [(place.offset, kind, i) for kind, each in ranges.items() for i, place in enumerate(each)]
    return [(kind, i) for _, kind, i in sorted(places)]
