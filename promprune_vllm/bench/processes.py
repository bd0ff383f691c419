"""Measures what a server's processes use: memory, shared memory, file descriptors, threads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_MIB = 1024  # in kB, the unit that Linux reports


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """Resource usage of a process and its descendants at one moment, without file pages, which vary by themselves.

    Args:
        memory_mib: Anonymous memory; pages shared by several processes count once.
        shared_mib: Shared memory (``/dev/shm`` and the like); pages shared by several processes count once.
        descriptors: Open files and sockets.
        threads: Threads.
    """

    memory_mib: float
    shared_mib: float
    descriptors: int
    threads: int


def measure_usage(process: int) -> ProcessUsage:
    """Measure a process and its descendants.

    Args:
        process: Id of the process.
    """
    first = psutil.Process(process)
    memory, shared, descriptors, threads = 0, 0, 0, 0
    for each in (first, *first.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError, ProcessLookupError):
            proportions = _proportions(each.pid)
            memory += proportions["Pss_Anon"]
            shared += proportions["Pss_Shmem"]
            descriptors += each.num_fds()
            threads += each.num_threads()
    return ProcessUsage(round(memory / _MIB, 1), round(shared / _MIB, 1), descriptors, threads)


def _proportions(process: int) -> dict[str, int]:
    """Return a process's proportional memory figures (``smaps_rollup``) by name, in kB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}


def growth(samples: Sequence[ProcessUsage], warm_up: float) -> dict[str, float]:
    """Return the relative growth of each figure from the first third after the warm-up to the last third.

    Args:
        samples: In order, evenly spaced in time.
        warm_up: Share of the samples to skip at the start.
    """
    later = [asdict(sample) for sample in samples[int(len(samples) * warm_up) :]]
    third = len(later) // 3
    if not third:
        return {}
    grown = {}
    for name in later[0]:
        first, last = (
            statistics.median(sample[name] for sample in part) for part in (later[:third], later[-third:])
        )
        grown[name] = (last - first) / max(first, 1)  # the growth of a tiny figure means nothing
    return grown
