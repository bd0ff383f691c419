"""How long things take, and how much memory they touch."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Clock = Callable[[Callable[[], object]], float]
"""Runs something and returns the milliseconds that took."""


def clock(threads: int) -> tuple[str, Clock]:
    """Return what is measured, in words, and what measures it.

    With one thread it is the time the processor worked for us: on an idle machine that is the time that passed,
    and neighbours on a busy one do not count.
    """
    what, now = ("CPU time", time.process_time) if threads == 1 else ("wall time", time.perf_counter)

    def timed(run: Callable[[], object]) -> float:
        start = now()
        run()
        return (now() - start) * 1000

    return what, timed


def in_turns(
    variants: Mapping[str, Callable[[], object]], repeats: int, timed: Clock
) -> dict[str, dict[str, float]]:
    """Time each variant ``repeats`` times, in turns, so that a disturbed second disturbs all alike.

    Returns:
        Variant -> milliseconds: ``median``, ``min`` and ``max``.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for lap in range(repeats + (repeats > 1)):  # the first lap is not counted, where there are several
        for name, run in variants.items():
            took = timed(run)
            if lap or repeats == 1:
                times[name].append(took)
    return {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of this process rose at most while something ran; Linux only.

    torch's memory is invisible to tracemalloc. Free memory is handed back first, the kernel's high-water mark is
    reset, and read after the call.
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
    """Bytes the machine can give without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
