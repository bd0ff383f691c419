"""How many tokens each image keeps: the server's limits applied to what was asked, in integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from promprune_vllm.core.budget import FIELD, Budget, BudgetRequest
from promprune_vllm.errors import BudgetError

OutOfRange = Literal["clamp", "refuse"]


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """What the operator allows, and what images keep that nobody asked anything for.

    Args:
        default: Kept where a request asks for nothing or for ``"auto"``; ``None`` keeps every token.
        minimum: An image never keeps fewer tokens than this (one with fewer tokens keeps them all).
        maximum: Nor more than this; ``None`` for no limit.
        low: Kept of an image sent with ``"detail": "low"``, in tokens.
        out_of_range: What becomes of an explicit budget outside the limits: moved to the limit, or refused.
        floor: Adapting to load or to content leaves ``"auto"`` at least this many tokens.

    Raises:
        BudgetError: When the limits contradict each other.
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

    def resolve(self, asked: Budget | None, total: int, level: Fraction = Fraction(1)) -> int:
        """Return how many of an image's ``total`` tokens are kept: ``1 <= keep <= total``.

        Args:
            asked: The request's budget, or ``None`` for the server's default.
            total: Visual tokens of the image before pruning, at least 1.
            level: Share of the default that ``"auto"`` keeps at the moment, above 0 and at most 1.

        Raises:
            BudgetError: An explicit budget outside the limits, where those refuse.
        """
        if total < 1:
            raise BudgetError(f"An image has at least one visual token, got {total}.")
        if asked is None:
            keep = min(total if self.default is None else self.default.of(total), total)
            lowered = Budget(share=level).of(keep)
            return self._clamped(max(lowered, min(self.floor, keep)), total)
        keep = min(asked.of(total), total)
        if self.out_of_range == "refuse" and not self.allows(keep, total):
            limits = f"{self.minimum} to {'any number' if self.maximum is None else self.maximum}"
            raise BudgetError(
                f"{FIELD} {asked.printed()!r} keeps {keep} of an image's {total} tokens; this server takes "
                f'{limits} tokens per image. Send a budget within, or "auto".',
                reason="limits",
            )
        return self._clamped(keep, total)

    def keeps_all(self, asked: Budget | None, level: Fraction | None = Fraction(1)) -> bool:
        """Whether an image keeps all its tokens, however many it has.

        Args:
            asked: As of ``resolve``.
            level: As of ``resolve``; ``None`` where it is not known.
        """
        if self.maximum is not None:
            return False
        if asked is None:
            return level == 1 and (self.default is None or self.default.share == 1)
        return asked.share == 1

    def resolve_all(self, ask: BudgetRequest, sizes: Sequence[int], levels: Sequence[Fraction]) -> tuple[int, ...]:
        """Return how many tokens each image of a request keeps.

        Args:
            ask: What the request asks for.
            sizes: Visual tokens of each image before pruning.
            levels: For each image, the share of the default that ``"auto"`` keeps.

        Raises:
            BudgetError: The ask does not fit the number of images, or is outside the limits.
        """
        ask.check_images(len(sizes))
        if ask.total is None:
            return tuple(
                self.resolve(ask.for_image(i), size, level)
                for i, (size, level) in enumerate(zip(sizes, levels, strict=True))
            )
        spread = min(ask.total, sum(sizes)) - len(sizes)  # beyond the one token that each image keeps
        more = self.allocate(spread, [size - 1 for size in sizes])
        return tuple(self.resolve(Budget(tokens=1 + extra), size) for extra, size in zip(more, sizes, strict=True))

    def allocate(self, keep: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Split ``keep`` over groups (crops, images) in proportion to their sizes, by largest remainder.

        Args:
            keep: Tokens to give out, ``0 <= keep <= sum(sizes)``.
            sizes: Tokens of each group before pruning.

        Returns:
            One count per group, each at most the group's size, summing to ``keep`` exactly. Equal remainders
            go to the earlier group.
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

    def allows(self, keep: int, total: int) -> bool:
        """Return whether the limits let an image keep ``keep`` of its ``total`` tokens."""
        return self._clamped(keep, total) == keep

    def _clamped(self, keep: int, total: int) -> int:
        if self.maximum is not None:
            keep = min(keep, self.maximum)
        return min(max(keep, self.minimum), total)
