"""Processes that commands of ours start, none of which outlives the command, and signals that end one in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_SUPERVISOR = (sys.executable, "-m", "promprune_vllm.demo.supervisor")
_ENDING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has one


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process with status 128 + N, through every ``finally`` and ``with``.

    By default they end it on the spot. A signal that is ignored stays so, as SIGHUP is under ``nohup``. Ctrl-C is
    an exception already.
    """
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    for (
        each
    ) in _ENDING:  # `timeout` and terminals send a second one right behind, which would disturb the clearing up
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def hang_up_as_sigterm() -> None:
    """Let SIGHUP do what SIGTERM does: vLLM stops its engines on that one, and by SIGHUP they would be orphans."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


@contextmanager
def supervised(
    words: Sequence[str], *, folder: Path | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command while the block is open; it ends with this process at the latest, whatever ends that.

    Args:
        words: The command. Its standard input is empty.
        folder: Removed once the command was stopped, also where this process was killed and cannot do it.
        options: Of ``subprocess.Popen``: output, environment.

    Yields:
        The process that runs the command and ends with its status, 128 + N where signal N ended it. What the
        command starts are its descendants.
    """
    read_end, write_end = os.pipe()  # no child inherits the write end: what closes it is this process's end, or we
    try:
        command = [*_SUPERVISOR, "" if folder is None else str(folder), *words]
        # In a session of its own, for Ctrl-C is no signal to it.
        process = subprocess.Popen(command, stdin=read_end, start_new_session=True, **options)
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    try:
        yield process
    finally:
        with _undisturbed():
            os.close(write_end)
            process.wait()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C and signals wait: stopping takes seconds at most, for the supervisor kills what does not stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_ENDING)}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
    if came and sys.exc_info()[0] is None:
        os.kill(os.getpid(), came[0])
