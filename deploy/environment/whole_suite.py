#!/usr/bin/env python3
"""Run one tier of the suite in two processes side by side: `whole_suite.py`, or `whole_suite.py -mrelease`.

Servers spend much of their start on one core, so on two the suite takes two thirds of the time. The processes take
modules from one list (`tests/module_queue.py`). Options go to both. The tests of each commit run on Model Runner
V2, and are held to their coverage. The release tier runs on V1, and with it the tests of the engine once more; its
own tests of what depends on the runner run on V2 too.
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
ENGINE_TESTS = (
    "tests/engine",
    *("tests/server/test_faults.py", "tests/server/test_budget.py", "tests/server/test_reply.py"),
    *("tests/server/test_metrics.py", "tests/server/test_two_ranks.py"),
)
"""They have the worker or the engine as their subject, and depend on vLLM's model runner."""
WITHOUT_RUNNER = tuple(
    f"tests/engine/test_{name}.py"
    for name in (
        *("answer_confidence", "borrowed_mu", "calibrate", "checkpoints", "demo_model", "demo_training"),
        *("encode_once", "family_inputs", "family_models", "image_options", "logprobs", "megapixel"),
        *("mrope_functions", "no_hooks", "placeholders", "saliency", "tower_protocol"),
    )
)
"""Of these, what is the same on every runner: processors, checkpoints, towers, names of tokens."""
V2_TESTS = (
    *("tests/engine/test_runners.py", "tests/engine/test_disaggregation.py", "tests/engine/test_mrope_reach.py"),
    *("tests/engine/test_sharded_encoder.py", "tests/server/test_two_ranks.py", "tests/server/test_metrics.py"),
    *("tests/server/test_soak.py", "tests/server/test_kept_right_with_options.py"),
    "tests/engine/test_late_results.py",
)
"""What the release tier runs on V2 too: mutants, and what depends on the runner or SECURITY.md claims."""
RUNNER = "PROMPRUNE_TEST_RUNNER"
PROCESSES = {"servers": "1", "others": ""}
"""Name, and whether it begins with the tests of servers."""
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
    if RELEASE not in options:
        yield [*MEASURED, *options], {}
        return
    # V1, as users have it on a CPU: with V2's interpreted kernels, all of it would take far longer.
    v1 = {RUNNER: "v1"}
    yield [*options], v1
    of_each_commit = ["-m", "not release", *(option for option in options if option != RELEASE)]
    yield [*of_each_commit, *ENGINE_TESTS, *(f"--ignore={path}" for path in WITHOUT_RUNNER)], v1
    yield [*options, *V2_TESTS], {RUNNER: "v2-async"}


def main(options: Sequence[str]) -> int:
    broken = [(name, variables) for words, variables in runs(options) for name in failed(words, variables)]
    for name, variables in broken:
        print(" ".join((f"Failed: the tests of {name}", *variables.values())), file=sys.stderr)
    covered = RELEASE in options or is_covered()
    return 1 if broken or not covered else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
