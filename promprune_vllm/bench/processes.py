"""What a server's processes hold: memory, file descriptors, shared memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_MIB = 1024  # in kB, as Linux tells them


@dataclass(frozen=True, slots=True)
class Held:
    """One look at a process and all it started. Pages of files are left out: they come and go as others map them.

    Args:
        memory_mib: Anonymous memory; what several share counts once.
        shared_mib: Mapped of ``/dev/shm`` and the like; what several share counts once.
        descriptors: Open files and sockets.
        threads: Threads.
    """

    memory_mib: float
    shared_mib: float
    descriptors: int
    threads: int


def held(process: int) -> Held:
    """Look at a process and all it started."""
    first = psutil.Process(process)
    memory, shared, descriptors, threads = 0, 0, 0, 0
    for each in (first, *first.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError, ProcessLookupError):
            proportions = _proportions(each.pid)
            memory += proportions["Pss_Anon"]
            shared += proportions["Pss_Shmem"]
            descriptors += each.num_fds()
            threads += each.num_threads()
    return Held(round(memory / _MIB, 1), round(shared / _MIB, 1), descriptors, threads)


def _proportions(process: int) -> dict[str, int]:
    """Return a process's shares of what it maps, in kB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}


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
    grown = {}
    for name in later[0]:
        first, last = (statistics.median(look[name] for look in part) for part in (later[:third], later[-third:]))
        grown[name] = (last - first) / max(first, 1)  # of next to nothing, nothing can be told
    return grown
