"""How long a stage of the run may take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock."""

    moment: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the moment that is ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Return the seconds until then, 0 if it is over."""
        return max(0.0, self.moment - time.monotonic())

    def require(self, seconds: float, what: str) -> None:
        """Check that there is time for something.

        Raises:
            TimeoutError: Less than ``seconds`` are left.
        """
        if (left := self.left()) < seconds:
            raise TimeoutError(f"{what} needs about {seconds:.0f} s, and {left:.0f} s are left for this stage")


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of a stage.

    Args:
        least: Seconds below which it is not worth starting.
        share: Weight with which it gets a part of the time that no stage needs.
    """

    least: float
    share: float


def allowance(costs: Sequence[Cost], seconds: float) -> float:
    """Return the seconds that the first of several stages may take; 0 if it does not fit.

    Earlier stages are worth more per second: they get what they need at least before later ones do. What is left
    over after the needs of all stages that fit is divided by share. Called again before each stage, so that time
    that one did not use goes to the others.

    Args:
        costs: Of the stages still to come, in order.
        seconds: Time left for all of them.
    """
    needed, shares = 0.0, 0.0
    for cost in costs:
        if needed + cost.least <= seconds:
            needed += cost.least
            shares += cost.share
    first = costs[0]
    if first.least > seconds:
        return 0.0
    return first.least + (seconds - needed) * first.share / shares
