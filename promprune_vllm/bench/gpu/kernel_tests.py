"""Runs ``tests/kernels`` of a checkout on the device."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from promprune_vllm.bench.gpu.child import end_of
from promprune_vllm.bench.gpu.clock import Deadline
from promprune_vllm.demo.processes import supervised
from promprune_vllm.errors import BenchError

ROOT = Path(__file__).parents[3]
FOLDER = Path("tests") / "kernels"
LOG = "kernel-tests.log"
_OUTCOME = re.compile(r"^(tests\S*::.*) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
_NO_TESTS_FAILED, _SOME_TESTS_FAILED = 0, 1


def missing() -> str:
    """Return why the tests cannot run, or an empty text."""
    if not (ROOT / FOLDER).is_dir():
        return f"{FOLDER} is only in a checkout of the repository"
    absent = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported" if absent else ""


def measure(tests: Sequence[str], out: Path, deadline: Deadline) -> Generator[dict[str, Any], None, None]:
    """Run tests and yield their outcomes, once.

    If the time is over before their end, the outcomes are of those that ran, and pytest is stopped.

    Args:
        tests: Files or tests of the folder.
        out: Folder for pytest's output.
        deadline: When to stop.

    Raises:
        BenchError: A test failed, or pytest itself.
        subprocess.TimeoutExpired: The time is over.
    """
    # Without the project's settings: they load plugins that only its own environment has, and make errors of
    # warnings, which another version of torch may give.
    words = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    words += ["-v", "--color=no", "--tb=short", "-m", "not release"]
    words += [str(ROOT / FOLDER / each) for each in tests]
    log, variables = out / LOG, {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    expired: subprocess.TimeoutExpired | None = None
    with (
        log.open("wb") as output,
        supervised(words, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=ROOT) as process,
    ):
        try:
            process.wait(deadline.left())
        except subprocess.TimeoutExpired as error:
            expired = error
    found = outcomes(log.read_text(encoding="utf-8", errors="replace"))
    yield {**found, "command": shlex.join(["pytest", *(str(FOLDER / each) for each in tests)])}
    if expired is not None:
        raise expired
    if process.returncode == _SOME_TESTS_FAILED and found["failed"]:
        raise BenchError(f"{found['failed']} tests failed, see {LOG}")
    if process.returncode != _NO_TESTS_FAILED:
        raise BenchError(f"pytest exited with status {process.returncode}:\n{end_of(log)}")


def outcomes(output: str) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped, by the output of ``pytest -v``, and which failed."""
    by: dict[str, list[str]] = {name: [] for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    for name, outcome in _OUTCOME.findall(output):
        by[outcome].append(name)
    failures = by["FAILED"] + by["ERROR"]
    return {
        "passed": len(by["PASSED"]),
        "failed": len(failures),
        "skipped": len(by["SKIPPED"]),
        "failures": failures,
    }
