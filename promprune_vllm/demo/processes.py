"""Child processes that never outlive our commands, and signals that end a command cleanly."""

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
# Windows has no SIGHUP.
_END_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def end_on_signals() -> None:
    """Make SIGTERM and SIGHUP end this process with status 128 + N, running every ``finally`` and ``with`` exit.

    By default they end it immediately. Ignored signals stay ignored, such as SIGHUP under ``nohup``. Ctrl-C
    already raises an exception.
    """
    for number in _END_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    # `timeout` and terminals send a second signal right after the first, which would interrupt the cleanup.
    for each in _END_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def hang_up_as_sigterm() -> None:
    """Treat SIGHUP like SIGTERM, on which vLLM stops its engines; SIGHUP would leave them as orphans."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


@contextmanager
def supervised(
    words: Sequence[str], *, folder: Path | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command inside the block; it never outlives this process, however this process ends.

    Args:
        words: Command and arguments. Its standard input is empty.
        folder: Folder to remove after the command has stopped, even if this process is killed.
        options: Options of ``subprocess.Popen``: output, environment.

    Yields:
        The supervising process. It ends with the command's status, or 128 + N if signal N ended the command. The
        command and its children are its descendants.
    """
    read_end, write_end = os.pipe()  # no child inherits the write end: only our close or our exit closes it
    try:
        command = [*_SUPERVISOR, "" if folder is None else str(folder), *words]
        # In its own session, so that Ctrl-C does not reach it.
        process = subprocess.Popen(command, stdin=read_end, start_new_session=True, **options)
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    try:
        yield process
    finally:
        with _defer_signals():
            os.close(write_end)
            process.wait()


@contextmanager
def _defer_signals() -> Iterator[None]:
    """Defer Ctrl-C and signals inside the block, which takes seconds: the supervisor kills what does not stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_END_SIGNALS)}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
    if received and sys.exc_info()[0] is None:
        os.kill(os.getpid(), received[0])
