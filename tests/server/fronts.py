"""Programs that stand before a server: started as a process, and gone when the block ends."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from promprune_vllm.demo.processes import supervised

_START_SECONDS = 200


@contextmanager
def running(words: Sequence[str], *, log: Path, ready: str) -> Iterator[None]:
    """Run a program inside the block, from when it answers.

    Args:
        words: Command and arguments.
        log: File for its output.
        ready: Address that is answered with 200 as soon as the program serves.

    Raises:
        AssertionError: It ended, or did not answer in time; the text is the end of its log.
    """
    with (
        log.open("wb") as output,
        supervised(words, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(ready):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
