"""Which runner tests get: one variable, for this process and for all that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from tests import runner
from tests.runner.children import runner_hooks

ASKED = """
import sys
import runner_hooks
from importlib.util import find_spec
hooked = any(isinstance(each, runner_hooks._Hooks) for each in sys.meta_path)
print(runner_hooks.chosen(), hooked, find_spec("triton"))
"""


def started(**environment: str) -> str:
    """What a process says of its runner, of hooks on its imports, and of Triton, if vLLM is not imported."""
    return subprocess.run(
        [sys.executable, "-c", ASKED],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_without_a_wish_it_is_what_gpus_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(runner_hooks.VARIABLE)
    assert runner.chosen() == "v2-async"
    assert runner.is_v2()
    assert runner.schedules_ahead()


def test_a_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runner_hooks.VARIABLE, "v3")
    with pytest.raises(ValueError, match="v3 names no runner: choose from v2-async, v2, v1"):
        runner.chosen()


@pytest.mark.skipif(PathFinder.find_spec("triton") is not None, reason="this environment has Triton itself")
@pytest.mark.parametrize("name", runner_hooks.RUNNERS)
def test_a_process_of_a_test_has_its_runner_and_sees_no_triton(name: str) -> None:
    assert started(**{runner_hooks.VARIABLE: name}) == f"{name} {name != 'v1'} None"


def test_folders_come_before_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("/a", str(runner.CHILDREN))))
    assert runner.python_path(Path("/b"), Path("/a")) == os.pathsep.join(("/b", "/a", str(runner.CHILDREN)))
    monkeypatch.delenv("PYTHONPATH")
    assert runner.python_path(Path("/b")) == "/b"


def test_without_triton_there_is_no_v2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner_hooks, "TRITON", tmp_path)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv(runner_hooks.VARIABLE, "v2")
    assert "make test" in str(runner.missing())
    monkeypatch.setenv(runner_hooks.VARIABLE, "v1")
    assert runner.missing() is None


@pytest.mark.parametrize(
    ("log", "name"),
    [
        ("", "v1"),
        ("Using V2 Model Runner", "v2-async"),
        (f"{runner_hooks.SCHEDULES_AHEAD} True\nUsing V2 Model Runner", "v2-async"),
        (f"{runner_hooks.SCHEDULES_AHEAD} False\nUsing V2 Model Runner", "v2"),
    ],
)
def test_a_log_tells_the_runner(log: str, name: str) -> None:
    assert runner.in_force(log) == name
