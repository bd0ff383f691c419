#!/usr/bin/env python3
"""Run the whole suite in two parallel processes, and check its coverage: `whole_suite.py`.

Servers use a single core for much of their start, so with two processes the suite takes two thirds of the time.
tests/server runs in one process, all other folders in the other. Arguments go to both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
APART = "server"
"""The folder below tests/ that takes about as long as all others together."""


def folders() -> dict[str, list[str]]:
    """Return the test folders of each process."""
    tests = ROOT / "tests"
    names = sorted({path.parent.relative_to(tests).parts[0] for path in tests.glob("*/**/test_*.py")})
    return {APART: [f"tests/{APART}"], "rest": [f"tests/{each}" for each in names if each != APART]}


def start(name: str, paths: Sequence[str], options: Sequence[str]) -> subprocess.Popen[str]:
    """Start the tests of some folders, with coverage in a separate file."""
    coverage = ("--cov", "--cov-report=", "--cov-fail-under=0")
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *coverage, *options, *paths],
        cwd=ROOT,
        env={**os.environ, "COVERAGE_FILE": str(ROOT / f".coverage.{name}"), "PYTHONUNBUFFERED": "1"},
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


def main(options: Sequence[str]) -> int:
    processes = {name: start(name, paths, options) for name, paths in folders().items()}
    lock = threading.Lock()
    readers = [threading.Thread(target=show, args=(process, lock)) for process in processes.values()]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    failed = [name for name, process in processes.items() if process.wait()]
    if failed:
        print(f"Failed: the tests of {' and of '.join(failed)}.", file=sys.stderr)
    files = [str(ROOT / f".coverage.{name}") for name in processes]
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "combine", *files], cwd=ROOT, check=True)
    uncovered = subprocess.run([*coverage, "report"], cwd=ROOT, check=False).returncode
    return 1 if failed or uncovered else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
