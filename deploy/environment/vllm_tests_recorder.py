"""pytest plugin for vLLM's own tests: loads vLLM's general plugins, records outcomes, blocks network access.

`vllm_tests.py` starts pytest with it twice, with and without our plugin in ``VLLM_PLUGINS``.
"""

from __future__ import annotations

import gc
import json
import os
import socket
from pathlib import Path
from typing import Any

OUTCOMES = "VLLM_TESTS_OUTCOMES"
"""Variable with the path of the output file: one JSON array per test with its name, outcome and failure text."""
_KEPT = 2000  # characters of a failure
_look_up = socket.getaddrinfo


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(_Recorder())
    # A test that needs the network fails at once, instead of after a minute of retries.
    socket.getaddrinfo = _look_up_here


def pytest_sessionstart() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # Some of our patches are applied when an engine requests its scheduler; tests create schedulers themselves.
    from vllm.config.scheduler import SchedulerConfig

    SchedulerConfig.default_factory().get_scheduler_cls()


def pytest_collection_finish() -> None:
    # vLLM's suite runs the garbage collector after every test. Freezing what is imported makes that ten times
    # faster, and nothing may unfreeze it.
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(report.nodeid, "not collected", report)


class _Recorder:
    """Combines the reports of a test's setup, call and teardown into one outcome."""

    def __init__(self) -> None:
        self.outcome = "passed"
        self.failure: Any = None

    def pytest_runtest_logstart(self) -> None:
        self.outcome, self.failure = "passed", None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.outcome, self.failure = "failed" if report.when == "call" else "error", report
        elif report.skipped and self.outcome == "passed":
            self.outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        _write(nodeid, self.outcome, self.failure)


def _look_up_here(host: Any, *args: Any, **kwargs: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else host
    numeric = not name or name[-1].isdigit() or ":" in name
    if numeric or name in ("localhost", socket.gethostname()):
        return _look_up(host, *args, **kwargs)
    raise socket.gaierror(socket.EAI_NONAME, f"{name} is not resolved while vLLM's tests run")


def _write(name: str, outcome: str, report: Any) -> None:
    failure = str(report.longrepr)[-_KEPT:] if report is not None else ""
    with Path(os.environ[OUTCOMES]).open("a") as file:
        file.write(json.dumps([name, outcome, failure]) + "\n")
