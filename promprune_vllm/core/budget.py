"""How many tokens an image keeps: integers only, known before the encoder has run.

Nothing here looks at pixels or features, so the placeholder in the prompt, the scheduler, the KV blocks
and the encoder's output always agree on the count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from promprune_vllm.errors import BudgetError

FIELD = "visual_token_budget"
MAX_BUDGET_TOKENS = 1_000_000
"""Largest number of tokens a request may ask for; far above any image, far below any overflow."""

_NEXT_STEP = f"Send an integer from 1 to {MAX_BUDGET_TOKENS}, or leave the field out to keep every token."


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked for, per image: a number of tokens or a share of the image's tokens.

    Args:
        tokens: Visual tokens to keep, 1 to ``MAX_BUDGET_TOKENS``.
        share: Share of the image's tokens to keep, above 0 and at most 1.

    Raises:
        BudgetError: Unless exactly one of the two is given and within its limits.
    """

    tokens: int | None = None
    share: Fraction | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.share is None):
            raise BudgetError("A budget is either a number of tokens or a share of them: give exactly one.")
        if self.tokens is not None and not 1 <= self.tokens <= MAX_BUDGET_TOKENS:
            raise BudgetError(
                f"{FIELD} must be between 1 and {MAX_BUDGET_TOKENS} tokens, got {_shown(self.tokens)}. "
                f"{_NEXT_STEP}"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise BudgetError(f"A share of visual tokens must be above 0 and at most 1, got {self.share}.")

    @classmethod
    def parse(cls, value: object) -> Budget:
        """Read the value a client sent as ``visual_token_budget``.

        Args:
            value: What JSON decoding gave. Only a true integer is a budget: ``true``, ``64.0`` and ``"64"``
                are refused, because guessing what they mean would hide a client's mistake.

        Raises:
            BudgetError: With the value, the limits and the next step.
        """
        if isinstance(value, bool) or not isinstance(value, int):
            raise BudgetError(
                f"{FIELD} must be an integer between 1 and {MAX_BUDGET_TOKENS}, "
                f"got {_shown(value)} ({_json_type(value)}). {_NEXT_STEP}"
            )
        return cls(tokens=value)


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """The server's limits on what an image keeps, in tokens per image.

    Args:
        default: Kept when a request asks for nothing; ``None`` keeps every token.
        minimum: Never keep fewer than this (an image with fewer tokens keeps them all).
        maximum: Never keep more than this; ``None`` for no limit.

    Raises:
        BudgetError: When the limits contradict each other.
    """

    default: Budget | None = None
    minimum: int = 1
    maximum: int | None = None

    def __post_init__(self) -> None:
        if self.minimum < 1 or (self.maximum is not None and self.maximum < self.minimum):
            raise BudgetError(
                f"The limits must satisfy 1 <= minimum <= maximum, got {self.minimum} and {self.maximum}."
            )

    def resolve(self, asked: Budget | None, total: int) -> int:
        """Return how many of an image's ``total`` tokens are kept: ``1 <= keep <= total``.

        Args:
            asked: The request's budget, or ``None`` for the server's default.
            total: Visual tokens of the image before pruning, at least 1.
        """
        if total < 1:
            raise BudgetError(f"An image has at least one visual token, got {total}.")
        budget = asked if asked is not None else self.default
        if budget is None:
            keep = total
        elif budget.tokens is not None:
            keep = budget.tokens
        else:
            assert budget.share is not None
            keep = -(-budget.share.numerator * total // budget.share.denominator)  # exact ceiling
        if self.maximum is not None:
            keep = min(keep, self.maximum)
        return min(max(keep, self.minimum), total)

    def allocate(self, keep: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Split ``keep`` over groups (crops, frames) in proportion to their sizes, by largest remainder.

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


def _shown(value: object, limit: int = 80) -> str:
    """Return a value as a message may show it: a client's input can be of any size."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"


def _json_type(value: object) -> str:
    names = {
        bool: "boolean",
        float: "number with a fraction or exponent",
        str: "string",
        dict: "object",
        list: "array",
    }
    return names.get(type(value), type(value).__name__)
