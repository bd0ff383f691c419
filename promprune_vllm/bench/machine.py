"""Measures the time and memory that functions take."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Clock = Callable[[Callable[[], object]], float]
"""Runs a function and returns the milliseconds it took."""


def clock(threads: int) -> tuple[str, Clock]:
    """Return the name of the clock, and the clock.

    With one thread it is CPU time: on an idle machine that equals wall time, and on a busy one other processes do
    not count.
    """
    what, now = ("CPU time", time.process_time) if threads == 1 else ("wall time", time.perf_counter)

    def timed(run: Callable[[], object]) -> float:
        start = now()
        run()
        return (now() - start) * 1000

    return what, timed


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], repeats: int, timed: Clock
) -> dict[str, dict[str, float]]:
    """Time each variant ``repeats`` times, alternating, so that a disturbance affects all variants alike.

    Returns:
        Variant -> milliseconds: ``median``, ``min`` and ``max``.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for lap in range(repeats + (repeats > 1)):  # with several laps, the first only warms up
        for name, run in variants.items():
            took = timed(run)
            if lap or repeats == 1:
                times[name].append(took)
    return {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def peak_memory(run: Callable[[], object]) -> int | None:
    """Return the peak increase in this process's resident memory, in bytes, while a function ran; Linux only.

    tracemalloc cannot see torch's memory. So this releases free memory, resets the kernel's high-water mark, and
    reads it after the call. ``None`` on other systems.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def available_memory() -> int:
    """Return the bytes that the machine can allocate without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
