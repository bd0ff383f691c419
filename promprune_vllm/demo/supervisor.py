"""Runs a command that must not outlive its owner: ``python -m promprune_vllm.demo.supervisor FOLDER COMMAND``.

Standard input is a pipe that nobody writes to, and only the owner process holds its other end. The system closes
it however the owner ends, even by SIGKILL. At end of file, the command and everything it started are stopped, and
FOLDER is removed. The exit status is the command's, or 128 + N if signal N ended it.
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
"""Time for a command to end by itself before it and its children are killed."""
_LINGER_SECONDS = 5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def supervise(folder: Path | None, words: Sequence[str]) -> int:
    """Run a command until it ends, or until end of file on standard input.

    Args:
        folder: Folder to remove if the command was stopped; if it ended by itself, the owner still reads it.
        words: Command and arguments.

    Returns:
        Exit status of the command.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A signal to all of our processes has reached the command too, so just wait for it. Not SIG_IGN, which the
        # command would inherit.
        signal.signal(number, lambda *_: None)
    # In its own session: its process group has all it starts, and a terminal's signals do not reach it.
    command = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_parent_death_signal(),  # noqa: PLW1509  # no thread has been started yet
    )
    over = threading.Event()
    threading.Thread(target=_stop_at_end_of_file, args=(command, over), daemon=True).start()
    status = command.wait()
    kill_group(command.pid)
    if over.is_set() and folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


def kill_group(group: int) -> None:
    """Kill the rest of a process group and wait until it is gone.

    Python's resource tracker is not killed: once the others are gone, it removes their shared memory and exits.
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
    """Return the running processes of a group, without zombies."""
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
    # Even before the command installs handlers, Python cleans up on SIGINT, whereas SIGTERM just ends it.
    command.send_signal(signal.SIGINT)
    try:
        command.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        kill_group(command.pid)


def _parent_death_signal() -> Callable[[], None] | None:
    """Return a function for the child that requests SIGTERM if this process is killed; Linux only."""
    if sys.platform != "linux":
        return None
    prctl, us = ctypes.CDLL(None).prctl, os.getpid()

    def request_signal() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until exec, our own handler would ignore it
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != us:  # the parent was killed before the request
            os.kill(os.getpid(), signal.SIGTERM)

    return request_signal


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]) if sys.argv[1] else None, sys.argv[2:]))
