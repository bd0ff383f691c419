"""What a measurement was taken on, how long things take, and how much memory they touch."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Everything needed to judge or repeat a measurement."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "numba", "promprune-vllm")},
        "load before": round(os.getloadavg()[0], 2),
        "command": "promprune " + shlex.join(sys.argv[1:]),
    }


def clock(threads: int) -> tuple[str, Callable[[], float]]:
    """Return what is measured, in words, and the clock to read.

    With one thread it is the time the processor worked for us: on an idle machine that is the time that passed,
    and neighbours on a busy one do not count.
    """
    return ("CPU time", time.process_time) if threads == 1 else ("wall time", time.perf_counter)


def in_turns(
    variants: Mapping[str, Callable[[], object]], repeats: int, now: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Time each variant ``repeats`` times, in turns, so that a disturbed second disturbs all alike.

    Returns:
        Variant -> milliseconds: ``median``, ``min`` and ``max``.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for lap in range(repeats + (repeats > 1)):  # the first lap is not counted, where there are several
        for name, run in variants.items():
            start = now()
            run()
            if lap or repeats == 1:
                times[name].append((now() - start) * 1000)
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


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
