"""The files that metrics live in: prometheus_client's values in shared memory, with names of our own."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from promprune_vllm.errors import SettingsError

_FILE_BYTES = 1 << 20
"""Size of each of a process's four files. All series of all methods need two thirds of it, so files never grow."""


@cache
def mapped_values(directory: str, pid: int) -> Any:
    """Return prometheus_client's class for values in mmap files, with separate files in ``directory`` for us.

    The files are allocated in full at once: writing to a mapped page that no longer fits on the disk kills the
    process, with no error to catch. The files have their own names because vLLM's files in its directory are also
    named by process, and two writers of one file overwrite each other. There is one class per directory for the
    same reason.

    Raises:
        SettingsError: The directory cannot be written to.
    """
    from prometheus_client import values

    for kind in ("counter", "gauge_min", "gauge_sum", "histogram"):
        path = os.path.join(directory, f"{kind}_{_name(pid)}.db")
        try:
            with open(path, "ab") as file:
                os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
        except OSError as error:
            raise SettingsError(
                f"Metrics cannot be kept in {directory} ({error.strerror}): free some space there, or set TMPDIR "
                "to another directory."
            ) from error
    return values.MultiProcessValue(lambda: _name(pid))  # type: ignore[no-untyped-call]


def _name(pid: int) -> str:
    return f"promprune-{pid}"
