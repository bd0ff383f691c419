"""How many tokens each image and video keeps: the server's limits on the request's budget, in integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

from promprune_vllm.core.budget import FIELD, IMAGE, VIDEO, Budget, BudgetRequest
from promprune_vllm.core.frames import split_over_frames
from promprune_vllm.errors import BudgetError

OutOfRange = Literal["clamp", "refuse"]


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """The operator's limits on budgets, and the default for requests that set none: for images or for videos.

    What is said of an image here holds for a video in the policy for videos.

    Args:
        default: Budget for requests that set none and for ``"auto"``; ``None`` keeps every token.
        minimum: Minimum tokens kept per image (an image with fewer tokens keeps them all).
        maximum: Maximum tokens kept per image; ``None`` for no limit.
        low: Tokens kept of an image sent with ``"detail": "low"``.
        out_of_range: Whether an explicit budget outside the limits is clamped to the limit or refused.
        floor: Minimum tokens that ``"auto"`` keeps per image when it adapts to load or content.

    Raises:
        BudgetError: The limits contradict each other.
    """

    default: Budget | None = None
    minimum: int = 1
    maximum: int | None = None
    low: int = 64
    out_of_range: OutOfRange = "clamp"
    floor: int = 64

    def __post_init__(self) -> None:
        if self.minimum < 1 or (self.maximum is not None and self.maximum < self.minimum):
            raise BudgetError(
                f"The limits must satisfy 1 <= minimum <= maximum, got {self.minimum} and {self.maximum}."
            )
        for name in ("low", "floor"):
            if getattr(self, name) < 1:
                raise BudgetError(f"{name} must be at least 1 token, got {getattr(self, name)}.")

    def resolve(
        self,
        budget: Budget | None,
        total: int,
        level: Fraction = Fraction(1),
        *,
        frames: int = 1,
        kind: str = IMAGE,
    ) -> int:
        """Return how many of an image's ``total`` tokens are kept: ``1 <= keep <= total``.

        Args:
            budget: The request's budget, or ``None`` for the server's default.
            total: Visual tokens of the image before pruning, at least 1.
            level: Share of the default that ``"auto"`` currently keeps, above 0 and at most 1.
            frames: Frames of a video.
            kind: ``IMAGE`` or ``VIDEO``, for error messages.

        Raises:
            BudgetError: An explicit budget is outside the limits, and ``out_of_range`` is ``"refuse"``.
        """
        if total < 1:
            raise BudgetError(f"An image or video has at least one visual token, got {total}.")
        if budget is None:
            keep = min(total if self.default is None else self.default.of(total, frames), total)
            reduced = Budget(share=level).of(keep)
            return self._clamped(max(reduced, min(self.floor, keep)), total)
        keep = min(budget.of(total, frames), total)
        if self.out_of_range == "refuse" and not self.allows(keep, total):
            limits = f"{self.minimum} or more" if self.maximum is None else f"{self.minimum} to {self.maximum}"
            raise BudgetError(
                f"{FIELD} {budget.printed()!r} keeps {keep} of this {kind}'s {total} tokens; this server allows "
                f'{limits} tokens per {kind}. Send a budget within these limits, or "auto".',
                reason="limits",
            )
        return self._clamped(keep, total)

    def keeps_all(self, budget: Budget | None, level: Fraction | None = Fraction(1)) -> bool:
        """Return whether an image of any size keeps all its tokens.

        Args:
            budget: See ``resolve``.
            level: See ``resolve``; ``None`` if it is not known.
        """
        if self.maximum is not None:
            return False
        if budget is None:
            return level == 1 and (self.default is None or self.default.share == 1)
        return budget.share == 1

    @staticmethod
    def allocate(keep: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Split ``keep`` over groups (crops, images) in proportion to their sizes, by largest remainder.

        Args:
            keep: Tokens to distribute, ``0 <= keep <= sum(sizes)``.
            sizes: Tokens of each group before pruning.

        Returns:
            One count per group, each at most the group's size, summing to ``keep`` exactly. Of equal remainders,
            the earlier group's is rounded up.
        """
        total = sum(sizes)
        if not 0 <= keep <= total or any(size < 0 for size in sizes):
            raise BudgetError(f"Cannot split {keep} tokens over groups of {list(sizes)} tokens.")
        if total == 0:
            return tuple(0 for _ in sizes)
        shares = [keep * size for size in sizes]
        counts = [share // total for share in shares]
        by_remainder = sorted(range(len(sizes)), key=lambda i: (-(shares[i] % total), i))
        for i in by_remainder[: keep - sum(counts)]:
            counts[i] += 1
        return tuple(counts)

    @staticmethod
    def share(keep: int, sizes: Sequence[int], *, frames: bool) -> tuple[int, ...]:
        """Split ``keep`` over the groups of one image or video, as its placeholder and its encoder both do.

        Args:
            keep: See ``allocate``.
            sizes: See ``allocate``.
            frames: Whether the groups are the frames of a video, which share evenly; see ``split_over_frames``.
        """
        return split_over_frames(keep, len(sizes), sizes[0]) if frames else BudgetPolicy.allocate(keep, sizes)

    def allows(self, keep: int, total: int) -> bool:
        """Return whether the limits allow an image to keep ``keep`` of its ``total`` tokens."""
        return self._clamped(keep, total) == keep

    def _clamped(self, keep: int, total: int) -> int:
        if self.maximum is not None:
            keep = min(keep, self.maximum)
        return min(max(keep, self.minimum), total)


class Medium(NamedTuple):
    """An image or a video of a prompt.

    Args:
        kind: ``IMAGE`` or ``VIDEO``.
        total: Visual tokens before pruning.
        level: Share of the default that ``"auto"`` keeps of it.
        frames: Frames of a video.
    """

    kind: str
    total: int
    level: Fraction = Fraction(1)
    frames: int = 1


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """The operator's policies for images and for videos."""

    images: BudgetPolicy = BudgetPolicy()
    videos: BudgetPolicy = BudgetPolicy()

    def of(self, kind: str) -> BudgetPolicy:
        """Return the policy for ``IMAGE`` or ``VIDEO``."""
        return {IMAGE: self.images, VIDEO: self.videos}[kind]

    def resolve_all(self, request: BudgetRequest, media: Sequence[Medium]) -> tuple[int, ...]:
        """Return how many tokens each image and video of a request keeps.

        Args:
            request: The request's budget.
            media: The images and videos in order of appearance.

        Raises:
            BudgetError: The request does not fit the images and videos, or is outside the limits.
        """
        request.check_media([each.kind for each in media])
        budgets = [request.for_medium(i, each.kind) for i, each in enumerate(media)]
        if request.total is not None:
            sizes = [each.total for each in media]
            rest = min(request.total, sum(sizes)) - len(sizes)  # each keeps at least one token
            shares = BudgetPolicy.allocate(rest, [size - 1 for size in sizes])
            budgets = [Budget(tokens=1 + more) for more in shares]
        return tuple(
            self.of(each.kind).resolve(budget, each.total, each.level, frames=each.frames, kind=each.kind)
            for budget, each in zip(budgets, media, strict=True)
        )
