"""What share of the default ``"auto"`` keeps while the server is busy: a few levels, one step at a time.

The levels are few on purpose: each level has its own cache entries, and requests at one level share them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

LEVELS = (Fraction(1), Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
"""Shares of the default, each half of the one before: moving up one level at most doubles what images use."""


@dataclass(frozen=True, slots=True)
class Load:
    """The load that one engine reports.

    Args:
        kv_usage: Used share of the KV cache, 0 to 1.
        waiting: Requests waiting to be scheduled.
    """

    kv_usage: float = 0.0
    waiting: int = 0

    @classmethod
    def worst(cls, loads: Iterable[Load]) -> Load:
        """Return the fullest cache and the longest queue of all engines; no load if there are none."""
        reports = list(loads) or [cls()]
        return cls(max(load.kv_usage for load in reports), max(load.waiting for load in reports))


@dataclass(frozen=True, slots=True)
class LoadLimits:
    """What counts as pressure, and how long it must last before the level moves. Times are in seconds.

    Args:
        high_usage: KV cache usage from which there is pressure. Below half of it, with an empty queue, it is
            calm: the next level up may double the usage, and that must not be pressure again.
        high_waiting: Number of waiting requests from which there is pressure.
        lower_after: How long pressure must last before each step down.
        release_after: How long calm must last before each step up.
        longest_release: Longest time calm must last, after steps up that brought the pressure back.
    """

    high_usage: float = 0.85
    high_waiting: int = 4
    lower_after: float = 0.5
    release_after: float = 5.0
    longest_release: float = 60.0

    def judge(self, load: Load) -> Literal["pressure", "calm", "between"]:
        """Classify a load. In between, the level stays as it is."""
        if load.kv_usage >= self.high_usage or load.waiting >= self.high_waiting:
            return "pressure"
        return "calm" if load.kv_usage < self.high_usage / 2 and not load.waiting else "between"


class LoadLevels:
    """The current level, which follows the observed load. Deterministic: the caller supplies the time.

    An empty queue does not show whether it would fill up again one level higher. So if a step up brings the
    pressure back, the next step up waits twice as long; under constant load, attempts become rarer.
    """

    def __init__(self, limits: LoadLimits | None = None) -> None:
        self._limits = limits or LoadLimits()
        self._index = 0
        self._state = "calm"
        self._since: float | None = None  # when this state began, or when it last moved the level
        self._released: float | None = None  # when the level last moved up
        self._patience = self._limits.release_after

    @property
    def level(self) -> Fraction:
        """The share of the default to keep now."""
        return LEVELS[self._index]

    def observe(self, load: Load, now: float) -> Fraction:
        """Record the load at time ``now``, which must not go back, and return the level from then on."""
        state = self._limits.judge(load)
        if state != self._state or self._since is None:
            self._state, self._since = state, now
        duration = now - self._since
        if state == "pressure" and self._index < len(LEVELS) - 1 and duration >= self._limits.lower_after:
            self._adjust_patience(now)
            self._index, self._since = self._index + 1, now
        elif state == "calm" and self._index and duration >= self._patience:
            self._index, self._since, self._released = self._index - 1, now, now
        return self.level

    def _adjust_patience(self, now: float) -> None:
        """Double the wait before the next step up if pressure came back soon after the last one."""
        if self._released is not None and now - self._released <= self._patience:
            self._patience = min(2 * self._patience, self._limits.longest_release)
        else:
            self._patience = self._limits.release_after
        self._released = None  # several steps down after one step up count once
