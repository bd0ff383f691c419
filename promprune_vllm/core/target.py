"""Which share of its tokens a request keeps so that enough answers stay what they would be with all tokens.

An operator states the wanted agreement, such as 99%. The server starts with all tokens and moves along a ladder
of shares. It moves down when audits have proven that the next share agrees often enough, and up when they show
that the present one does not. An audit can tell both without serving the next share to anybody: the engine reads
the answer behind the prompt with all tokens and behind the prompt with the next share, and compares.

The proof is a test that may be looked at after every audit (Ramdas and others, "Game-theoretic statistics and safe
anytime-valid inference", arXiv 2210.01948): the evidence against "agreement is at most the target" is a mean of
likelihood ratios, which exceeds 1 / e with probability e at most, however long one waits. A share is tried again
after it failed; attempt k of a share may err with probability e / (k (k + 1)), and the shares have equal parts of
``ERROR``. So over the whole life of a server whose traffic does not change, the probability that it ever serves a
share below the target is at most ``ERROR``. The ladder, the alternatives of the test and the split are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from promprune_vllm.core.budget import FULL, number_of, shown
from promprune_vllm.errors import BudgetError

SHARES = tuple(map(Fraction, ("1", "3/4", "1/2", "1/3", "1/4", "1/6", "1/8")))
"""The ladder. Few shares, since each has its own cache entries."""
ERROR = 0.05
"""Probability that a class of images is ever served below the target, while its traffic does not change."""
ALARM = 0.001
"""Chance that audits of a share that is just good enough move it up, each time that the alarm begins anew."""
AUDITED = "5%"
"""Requests that are audited if the operator sets a target and no share."""
CLASSES = (1024, 4096)
"""Images of up to so many tokens have a ladder together; larger ones have a third."""

# How often answers differ, compared with the target, if it is exceeded and if it is missed.
_EXCEEDED = (0.0, 0.125, 0.25, 0.5, 0.75)
_MISSED = (2.0, 4.0, 8.0, 16.0, 32.0)
_LARGEST = 0.99


@lru_cache(maxsize=65536)
def log_evidence(agreed: float, differed: float, target: float, *, exceeded: bool) -> float:
    """Return the natural logarithm of the evidence that answers agree more often than the target, or less often.

    Args:
        agreed: Audits whose answer was the same with all tokens. An audit of a sampled answer counts in part: an
            outcome between 0 and 1 with the same mean is no better evidence, as likelihood ratios are convex.
        differed: Those whose answer was another.
        target: Share of answers that are to agree, above 0 and below 1.
        exceeded: Whether the evidence is for more than the target, or for less.
    """
    rates = [min((1 - target) * factor, _LARGEST) for factor in (_EXCEEDED if exceeded else _MISSED)]
    logs = [_log_ratio(agreed, differed, rate, 1 - target) for rate in rates]
    largest = max(logs)
    return largest + math.log(sum(math.exp(each - largest) for each in logs) / len(logs))


def _log_ratio(agreed: float, differed: float, rate: float, null_rate: float) -> float:
    if differed and not rate:
        return -math.inf
    ratio = agreed * math.log((1 - rate) / (1 - null_rate))
    return ratio + (differed * math.log(rate / null_rate) if differed else 0.0)


@dataclass(slots=True)
class Audits:
    """What audits of one share have found.

    Args:
        agreed: Number of answers that were the same with all tokens; a sampled one counts in part.
        differed: Number of those that were not.
    """

    agreed: float = 0
    differed: float = 0

    def add(self, agreed: float) -> None:
        """Count one audit, from 0 to 1."""
        self.agreed += agreed
        self.differed += 1 - agreed

    def evidence(self, target: float, *, exceeded: bool) -> float:
        """Return ``log_evidence`` of these audits."""
        return log_evidence(self.agreed, self.differed, target, exceeded=exceeded)


@dataclass(slots=True)
class Ladder:
    """The share that images of one class keep. Deterministic: it follows from the audits in their order.

    Args:
        target: Share of answers that are to agree, above 0 and below 1.
        index: Of the present share in ``SHARES``.
        present: Audits of the present share since it last looked good.
        next: Audits of the next smaller share, in this attempt.
        attempts: Number of earlier attempts at each share.
    """

    target: float
    index: int = 0
    present: Audits = field(default_factory=Audits)
    next: Audits = field(default_factory=Audits)
    attempts: list[int] = field(default_factory=lambda: [0] * len(SHARES))

    @property
    def share(self) -> Fraction:
        """The share to keep now."""
        return SHARES[self.index]

    @property
    def next_share(self) -> Fraction | None:
        """The share to audit beside it: the next smaller one, if there is one."""
        return SHARES[self.index + 1] if self.index + 1 < len(SHARES) else None

    @property
    def allowed_error(self) -> float:
        """Probability with which the present attempt at the next share may be wrong."""
        attempt = self.attempts[min(self.index + 1, len(SHARES) - 1)] + 1
        return ERROR / (len(SHARES) - 1) / (attempt * (attempt + 1))

    @property
    def proof(self) -> float:
        """How far the proof of the next share has come: 1 moves the ladder. 0 at its end."""
        if self.next_share is None:
            return 0.0
        evidence = self.next.evidence(self.target, exceeded=True)
        return max(0.0, evidence / -math.log(self.allowed_error))

    def observe(self, share: Fraction, agreed: float) -> Fraction:
        """Count an audit of the present or the next share, and return the share to keep from then on.

        Audits of other shares, from requests that began before the last move, change nothing. All tokens agree
        with themselves, so audits of them change nothing either.
        """
        if share == self.next_share:
            self.next.add(agreed)
            self._move_down()
        elif share == self.share and self.index:
            self.present.add(agreed)
            self._move_up()
        return self.share

    def _move_down(self) -> None:
        if self.next.evidence(self.target, exceeded=True) >= -math.log(self.allowed_error):
            self._move(1)
        elif self.next.evidence(self.target, exceeded=False) >= -math.log(ALARM):
            self._start_again()  # old failures must not count forever: traffic changes

    def _move_up(self) -> None:
        evidence = self.present.evidence(self.target, exceeded=False)
        if evidence >= -math.log(ALARM):
            self._start_again()
            self._move(-1)
        elif evidence < 0:
            self.present = Audits()  # old successes must not hide a change

    def _move(self, step: int) -> None:
        self.index += step
        self.present, self.next = Audits(), Audits()
        if step < 0:
            self.attempts[self.index + 1] += 1  # the one that has just failed

    def _start_again(self) -> None:
        """Give up what is known of the next share: a new attempt begins, which has its own chance to err."""
        if self.next != Audits():
            self.attempts[self.index + 1] += 1
            self.next = Audits()


def size_class(tokens: int) -> int:
    """Return the class of an image or video by its visual tokens before pruning."""
    return sum(tokens > limit for limit in CLASSES)


def parse_target(text: str, budget: str | None = None) -> float:
    """Return a wanted agreement as a number, given ``"99%"`` or ``"0.99"``.

    Args:
        text: What the operator has set.
        budget: The default budget of images that is also set.

    Raises:
        BudgetError: It is not a share of at least 50% and below 100%, or a budget contradicts it.
    """
    if budget not in (None, FULL):
        raise BudgetError(
            f"a target finds the budget of images, and {shown(budget)} is set for them. Drop one of the two. The "
            "limits min, max and floor apply to what is found."
        )
    number = number_of(text.strip().removesuffix("%"))
    if number is not None and text.strip().endswith("%"):
        number = Fraction(number) / 100
    if number is None or not Fraction(1, 2) <= number < 1:
        raise BudgetError(
            "A target must be the share of answers that stay the same, at least 50% and below 100%, such as 99%, "
            f"got {shown(text)}."
        )
    return float(number)
