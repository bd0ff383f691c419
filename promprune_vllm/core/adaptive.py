"""Which share of the default ``"auto"`` keeps while the server is busy: few levels, one step at a time.

Few levels on purpose: every level is a count of its own in the caches, so requests of one level share entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

LEVELS = (Fraction(1), Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
"""Shares of the default, each half of the one before: going back one level at most doubles what images take."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one engine says about itself.

    Args:
        kv_usage: Used share of the KV cache, 0 to 1.
        waiting: Requests that wait to be admitted.
    """

    kv_usage: float = 0.0
    waiting: int = 0

    @classmethod
    def worst(cls, loads: Iterable[Load]) -> Load:
        """Return the load that decides: the fullest cache and the longest queue of all engines."""
        known = list(loads) or [cls()]
        return cls(max(load.kv_usage for load in known), max(load.waiting for load in known))


@dataclass(frozen=True, slots=True)
class LoadLimits:
    """What counts as pressure, and for how long it must last. Times are in the unit of the clock, seconds.

    Args:
        high_usage: A KV cache used this much is pressure; used less than half of it, with nobody waiting, is
            calm. Half, because the next level up may double what is used: it then still is no pressure.
        high_waiting: So many waiting requests are pressure.
        lower_after: Pressure must last this long before each step down.
        release_after: Calm must last this long before each step back up.
        longest_release: The longest wait for a step back up, after steps back that brought the pressure back.
    """

    high_usage: float = 0.85
    high_waiting: int = 4
    lower_after: float = 0.5
    release_after: float = 5.0
    longest_release: float = 60.0

    def judge(self, load: Load) -> Literal["pressure", "calm", "between"]:
        """Say what a load asks for; between the two, the level stays."""
        if load.kv_usage >= self.high_usage or load.waiting >= self.high_waiting:
            return "pressure"
        return "calm" if load.kv_usage < self.high_usage / 2 and not load.waiting else "between"


class LoadLevels:
    """The level in force, moved by what is observed. Deterministic: time is whatever the caller says it is.

    A queue cannot tell whether it comes back one level up. So a step back up that brings the pressure back
    makes the next one wait twice as long, and a constant load ends in ever rarer trials.
    """

    def __init__(self, limits: LoadLimits | None = None) -> None:
        self._limits = limits or LoadLimits()
        self._index = 0
        self._judged = "calm"
        self._since: float | None = None  # when this judgement began, or when it last moved the level
        self._released: float | None = None  # when the level last went back up
        self._patience = self._limits.release_after

    @property
    def level(self) -> Fraction:
        """The share of the default that is kept now."""
        return LEVELS[self._index]

    def observe(self, load: Load, now: float) -> Fraction:
        """Take in the load at a time, not before the last one, and return the level from then on."""
        judged = self._limits.judge(load)
        if judged != self._judged or self._since is None:
            self._judged, self._since = judged, now
        held = now - self._since
        if judged == "pressure" and self._index < len(LEVELS) - 1 and held >= self._limits.lower_after:
            self._learn(now)
            self._index, self._since = self._index + 1, now
        elif judged == "calm" and self._index and held >= self._patience:
            self._index, self._since, self._released = self._index - 1, now, now
        return self.level

    def _learn(self, now: float) -> None:
        """Wait longer with the next step back where the last one did not hold."""
        if self._released is not None and now - self._released <= self._patience:
            self._patience = min(2 * self._patience, self._limits.longest_release)
        else:
            self._patience = self._limits.release_after
        self._released = None  # several steps down after one step back are one lesson
