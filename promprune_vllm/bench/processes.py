"""What a server's processes hold: memory, file descriptors, shared memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Held:
    """One look at a process and all it started.

    Args:
        memory_mib: Proportional set size: what several share counts once.
        descriptors: Open files and sockets.
        threads: Threads.
        shared_mib: Of ``/dev/shm``, of the whole machine.
    """

    memory_mib: float
    descriptors: int
    threads: int
    shared_mib: float


def held(process: int) -> Held:
    """Look at a process and all it started."""
    first = psutil.Process(process)
    memory, descriptors, threads = 0, 0, 0
    for each in (first, *first.children(recursive=True)):
        try:
            with each.oneshot():
                memory += each.memory_full_info().pss
                descriptors += each.num_fds()
                threads += each.num_threads()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    shared = sum(file.stat().st_blocks * 512 for file in _SHARED.iterdir() if file.is_file())
    return Held(round(memory / 2**20, 1), descriptors, threads, round(shared / 2**20, 1))


def growth(looks: Sequence[Held], warm_up: float) -> dict[str, float]:
    """Return by what share each figure grew from the first third after warming up to the last.

    Args:
        looks: In order, evenly spaced in time.
        warm_up: Share of the looks that is left out.
    """
    later = [asdict(look) for look in looks[int(len(looks) * warm_up) :]]
    third = len(later) // 3
    if not third:
        return {}
    return {
        name: statistics.median(look[name] for look in later[-third:])
        / max(statistics.median(look[name] for look in later[:third]), 1e-9)
        - 1
        for name in later[0]
    }
