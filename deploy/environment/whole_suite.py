#!/usr/bin/env python3
"""Run one tier of the suite in two processes side by side: `whole_suite.py`, or `whole_suite.py -mrelease`.

Servers spend much of their start on one core, so on two the suite takes two thirds of the time. The processes take
modules from one list (`tests/module_queue.py`). Options go to both. The tests of each commit are held to their
coverage.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "-mrelease"
PROCESSES = {"servers": "1", "others": ""}
"""Name, and whether it begins with the tests of servers."""
COVERAGE = (sys.executable, "-m", "coverage")
REPORTS = ((), ("--include=*/promprune_vllm/engine/*", "--no-skip-covered"))
"""Of the whole package, and of what lives inside vLLM, file by file: each is held to `fail_under`."""


def data_file(name: str) -> str:
    return str(ROOT / f".coverage.{name}")


def start(name: str, queue: str, options: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process; coverage goes to a file of its own."""
    coverage = () if RELEASE in options else ("--cov", "--cov-report=", "--cov-fail-under=0")
    own = {"SUITE_QUEUE": queue, "SUITE_SERVERS": PROCESSES[name], "COVERAGE_FILE": data_file(name)}
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-ptests.module_queue", *coverage, *options],
        cwd=ROOT,
        env={**os.environ, **own, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def show(process: subprocess.Popen[str], lock: threading.Lock) -> None:
    """Print whole lines, so that the output of two processes does not mix within a line."""
    assert process.stdout is not None
    for line in process.stdout:
        with lock:
            print(line, end="", flush=True)


def failed(options: Sequence[str]) -> list[str]:
    """Run the tests, and return which processes had failures."""
    with tempfile.TemporaryDirectory(prefix="suite-") as queue:
        processes = {name: start(name, queue, options) for name in PROCESSES}
        lock = threading.Lock()
        readers = [threading.Thread(target=show, args=(process, lock)) for process in processes.values()]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return [name for name, process in processes.items() if process.wait()]


def is_covered() -> bool:
    """Add up the coverage, print it, and return whether it is enough."""
    subprocess.run([*COVERAGE, "combine", *map(data_file, PROCESSES)], cwd=ROOT, check=True)
    reports = [subprocess.run([*COVERAGE, "report", *each], cwd=ROOT, check=False) for each in REPORTS]
    return all(report.returncode == 0 for report in reports)


def main(options: Sequence[str]) -> int:
    broken = failed(options)
    if broken:
        print(f"Failed: the tests of {' and of '.join(broken)}.", file=sys.stderr)
    covered = RELEASE in options or is_covered()
    return 1 if broken or not covered else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
