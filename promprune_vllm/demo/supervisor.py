"""Runs a command while whoever wants it lives: ``python -m promprune_vllm.demo.supervisor FOLDER COMMAND``.

Standard input is a pipe that nobody writes to, and only the process that wants the command holds its other end.
The system closes it however that process ends, also by SIGKILL. At the end of file the command is stopped, with
everything it started, and FOLDER is removed. The status is the command's, 128 + N where signal N ended it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

GRACE_SECONDS = 20
"""How long a command may take to end by itself, before it and what it started are killed."""
_LINGER_SECONDS = 5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def supervise(folder: Path | None, words: Sequence[str]) -> int:
    """Run a command until it ends, or until standard input does.

    Args:
        folder: Removed after the command was stopped; of one that ended by itself, the parent still reads it.
        words: The command.

    Returns:
        Its exit status.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Whoever signals every process of ours has signalled the command too, and it is waited for. Not SIG_IGN,
        # which the command would inherit.
        signal.signal(number, lambda *_: None)
    # In a session of its own: its process group is all it starts, and a terminal's signals do not reach it.
    command = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_ended_with_us(),  # noqa: PLW1509  # no thread has been started yet
    )
    over = threading.Event()
    threading.Thread(target=_stop_at_end_of_file, args=(command, over), daemon=True).start()
    status = command.wait()
    kill_group(command.pid)
    if over.is_set() and folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


def kill_group(group: int) -> None:
    """Kill what is left of a process group and wait until it is gone.

    Python's resource tracker is left to end by itself: once the others are gone, it removes their shared memory.
    """
    deadline = time.monotonic() + _LINGER_SECONDS
    while (left := _members(group)) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.Error):
                if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                    process.kill()
        time.sleep(0.05)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _members(group: int) -> list[psutil.Process]:
    """Return the processes of a group that run; dead ones stay in it where nobody asks for their status."""
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def _stop_at_end_of_file(command: subprocess.Popen[bytes], over: threading.Event) -> None:
    while os.read(0, 1):
        pass
    over.set()
    command.send_signal(
        signal.SIGINT
    )  # before it has handlers too, Python then cleans up, where SIGTERM just ends it
    try:
        command.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        kill_group(command.pid)


def _ended_with_us() -> Callable[[], None] | None:
    """Return what a child calls on Linux so that it gets SIGTERM, should even this process be killed."""
    if sys.platform != "linux":
        return None
    prctl, us = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until the command is loaded, our handler would swallow it
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != us:  # killed before it was asked for
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]) if sys.argv[1] else None, sys.argv[2:]))
