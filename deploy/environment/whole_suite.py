#!/usr/bin/env python3
"""Run one tier of the suite in two processes side by side: `whole_suite.py`, or `whole_suite.py -mrelease`.

`whole_suite.py --coverage` runs the tests of each commit and holds them to their coverage. Measuring it takes half
as long again, so it has a run of its own (`make coverage`).

Servers spend much of their start on one core, so on two the suite takes two thirds of the time. The processes take
modules from one list (`tests/module_queue.py`). Options go to both. The tests of each commit run on Model Runner
V2. The release tier runs on V1, and its tests of what depends on the runner on V2 too. `whole_suite.py --left-out`
(`make test-families`) runs the families that `make test` leaves out, and on V1 what reaches into the runner.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "-mrelease"
V1_TESTS = tuple(
    f"tests/engine/test_{name}.py"
    for name in (
        *("clips", "failed_requests", "families", "llava", "methods_per_request", "mrope", "patches"),
        *("preemption", "videos"),
    )
)
"""Of the tests of each commit, what reaches into vLLM's model runner: they run on V1 once more."""
V2_TESTS = (
    *("tests/engine/test_runners.py", "tests/engine/test_disaggregation.py", "tests/engine/test_mrope_reach.py"),
    *("tests/engine/test_sharded_encoder.py", "tests/server/test_two_ranks.py", "tests/server/test_metrics.py"),
    *("tests/server/test_soak.py", "tests/server/test_kept_right_with_options.py"),
    *("tests/engine/test_late_results.py", "tests/engine/test_drafts.py", "tests/engine/test_feature_cache.py"),
)
"""What the release tier runs on V2 too: mutants, and what depends on the runner or SECURITY.md claims."""
FAMILY_TESTS = tuple(
    f"tests/engine/test_{name}.py"
    for name in (
        *("calibrate", "clips", "encode_once", "families", "family_places", "frames_by_content"),
        *("inspected_clips", "logprobs", "no_hooks", "saliency", "videos", "waits"),
    )
)
"""They take one family after the other; see `tests/engine/family_facts.py`."""
RUNNER = "PROMPRUNE_TEST_RUNNER"
FAMILIES = "PROMPRUNE_TEST_FAMILIES"
PROCESSES = {"servers": "1", "others": ""}
"""Name, and whether it begins with the tests of servers."""
COVERED, LEFT_OUT = "--coverage", "--left-out"
MEASURED = ("--cov", "--cov-report=", "--cov-fail-under=0")
COVERAGE = (sys.executable, "-m", "coverage")
REPORTS = ((), ("--include=*/promprune_vllm/engine/*", "--no-skip-covered"))
"""Of the whole package, and of what lives inside vLLM, file by file: each is held to `fail_under`."""


def data_file(name: str) -> str:
    return str(ROOT / f".coverage.{name}")


def start(name: str, queue: str, options: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a process with variables added to the environment; coverage goes to a file of its own."""
    own = {"SUITE_QUEUE": queue, "SUITE_SERVERS": PROCESSES[name], "COVERAGE_FILE": data_file(name)}
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-ptests.module_queue", *options],
        cwd=ROOT,
        env={**os.environ, **own, **variables, "PYTHONUNBUFFERED": "1"},
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


def failed(options: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """Run tests in all processes, and return which of them had failures."""
    with tempfile.TemporaryDirectory(prefix="suite-") as queue:
        processes = {name: start(name, queue, options, variables) for name in PROCESSES}
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


def runs(options: Sequence[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield the options and variables of each run of the suite that a tier consists of."""
    # V1, as users have it on a CPU: with V2's interpreted kernels, all of it would take far longer.
    v1, v2 = {RUNNER: "v1"}, {RUNNER: "v2-async"}
    if RELEASE in options:
        yield [*options], v1
        yield [*options, *V2_TESTS], v2
    elif LEFT_OUT in options:
        others = [each for each in options if each != LEFT_OUT]
        yield [*others, *FAMILY_TESTS], v2 | {FAMILIES: "others"}
        yield [*others, *V1_TESTS], v1 | {FAMILIES: "few"}
    else:
        yield [word for each in options for word in (MEASURED if each == COVERED else (each,))], {}


def main(options: Sequence[str]) -> int:
    broken = [(name, variables) for words, variables in runs(options) for name in failed(words, variables)]
    for name, variables in broken:
        print(" ".join((f"Failed: the tests of {name}", *variables.values())), file=sys.stderr)
    covered = COVERED not in options or is_covered()
    return 1 if broken or not covered else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
