"""What pruning cost one answer: its tokens, scored with the kept visual tokens and again with all of them.

A token of a greedy answer agrees if the model ranks it first with all visual tokens too. A token that was drawn at
random, or that a rule such as a grammar chose over the likeliest one, agrees with probability min(1, p / q): p is
its probability with all visual tokens, q with the kept ones. That is how speculative sampling accepts a token of a
draft (Leviathan et al. 2023, arXiv 2211.17192, section 2.3); expected over what the kept tokens say, it is 1 minus
the total variation distance of the two distributions. Deviation: p and q are those before temperature, top-p and
penalties, because vLLM scores a prompt without them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar

from promprune_vllm.core.budget import number_of, shown
from promprune_vllm.errors import BudgetError

KEPT = {"12.5%": Fraction(1, 8), "25%": Fraction(1, 4), "50%": Fraction(1, 2), "100%": Fraction(1)}
"""Name of a class of budgets -> the largest share of its visual tokens that a prompt in it keeps."""
MOST_WAITING = 8
"""Audits that may wait for the engine."""
MOST_BYTES = 256 << 20
"""Bytes of images and videos that are held for audits: of answers that are generated, and of audits that wait."""
_LEAST = -100.0
"""Lower log-probabilities are taken as this: vLLM gives minus infinity to what cannot be said."""
_Item = TypeVar("_Item")


def parse_share(text: str | None) -> float:
    """Parse the share of requests to audit, such as ``"1%"``; always a percentage, because 1 could mean either.

    Raises:
        BudgetError: It is not a percentage above 0 and at most 100.
    """
    if text is None:
        return 0.0
    number = number_of(text[:-1]) if text.endswith("%") else None
    if number is None or not 0 < number <= 100:
        raise BudgetError(
            f"The share of requests to audit must be a percentage above 0% and at most 100%, got {shown(text)}. "
            'Set one such as "1%", or leave it out for no audits.'
        )
    return float(number) / 100


def kept_class(kept: int, total: int) -> str:
    """Return the key of ``KEPT`` for a prompt that keeps ``kept`` of its ``total`` visual tokens."""
    return next(name for name, most in KEPT.items() if kept <= most * total)


@dataclass(frozen=True, slots=True)
class Scored:
    """One token of an answer, as the model scores it.

    Args:
        logprob: Natural logarithm of its probability, before temperature and penalties.
        first: Whether no token is more probable.
    """

    logprob: float
    first: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """What an audit finds about one answer.

    Args:
        tokens: Tokens of the answer.
        agreeing: How many of them all visual tokens would have said too; not a whole number for sampled answers.
        whole: Probability that all of them would; 0 or 1 for greedy answers.
        nats: By how many nats per token all visual tokens make the answer less probable than the kept ones; 0 if
            they make it more probable.
    """

    tokens: int
    agreeing: float
    whole: float
    nats: float


def compare(served: Sequence[Scored], audited: Sequence[Scored], *, greedy: bool) -> Finding:
    """Compare the scores of one answer, of at least one token.

    Args:
        served: Its tokens as they were generated, with the kept visual tokens.
        audited: The same tokens, with all visual tokens.
        greedy: Whether the likeliest token was chosen at each place.
    """
    pairs = list(zip(served, audited, strict=True))
    agreements = [_agreement(each, again, greedy) for each, again in pairs]
    lost = sum(max(each.logprob, _LEAST) - max(again.logprob, _LEAST) for each, again in pairs)
    return Finding(len(pairs), sum(agreements), math.prod(agreements), max(0.0, lost / len(pairs)))


def agreement(served: Sequence[Scored], *others: Sequence[Scored], greedy: bool) -> float:
    """Return the probability that an answer is the same with each of several sets of visual tokens.

    Of a sampled answer, it is a lower bound: a token agrees with probability min(1, p / q) of the least p.

    Args:
        served: Its tokens as they were generated, at least one.
        others: The same tokens, scored with other visual tokens.
        greedy: See ``compare``.
    """
    return math.prod(
        min(_agreement(each, again, greedy) for again in scores)
        for each, *scores in zip(served, *others, strict=True)
    )


def _agreement(served: Scored, audited: Scored, greedy: bool) -> float:
    if greedy and served.first:
        return float(audited.first)
    return math.exp(min(0.0, max(audited.logprob, _LEAST) - max(served.logprob, _LEAST)))


class AuditQueue(Generic[_Item]):
    """Audits that wait for the engine, oldest first, within limits on their number and on the bytes they hold.

    Args:
        most_waiting: How many may wait.
        most_bytes: How many bytes may be held, by those that wait and by answers that are still generated.
    """

    def __init__(self, most_waiting: int = MOST_WAITING, most_bytes: int = MOST_BYTES) -> None:
        self._most_waiting, self._most_bytes = most_waiting, most_bytes
        self._items: deque[_Item] = deque()
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def hold(self, size: int) -> bool:
        """Reserve bytes and return True, or return False if there are too few left."""
        if self.held_bytes + size > self._most_bytes:
            return False
        self.held_bytes += size
        return True

    def release(self, size: int) -> None:
        """Give back reserved bytes."""
        self.held_bytes -= size

    def push(self, item: _Item) -> bool:
        """Append an audit and return True, or return False if too many wait."""
        if len(self._items) >= self._most_waiting:
            return False
        self._items.append(item)
        return True

    def pop(self) -> _Item | None:
        """Remove and return the oldest audit, ``None`` if none waits."""
        return self._items.popleft() if self._items else None
