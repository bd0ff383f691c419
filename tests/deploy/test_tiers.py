"""Every test is in exactly one tier, `make test` or `make test-release`, and one of two processes runs it."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.documents import ROOT
from tests.runner.children.runner_hooks import RUNNERS, VARIABLE

TESTS = """
import pytest

def test_plain(): ...

@pytest.mark.release
def test_long(): ...

@pytest.mark.engine
@pytest.mark.parametrize("way", ["quick", pytest.param("slow", marks=pytest.mark.release)])
def test_both(way): ...

@pytest.mark.release
@pytest.mark.cuda
@pytest.mark.server
@pytest.mark.deploy
def test_with_every_mark(): ...
"""
COMMIT = {"test_plain", "test_both[quick]"}
RELEASE = {"test_long", "test_both[slow]", "test_with_every_mark"}


def selection(target: str) -> list[str]:
    """The words with which a target of the Makefile selects tests; pyproject.toml has those of all runs."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert found, target
    assert "whole_suite.py" in found.group(1)
    assert not re.search(r"--deselect|--ignore|\s-k", found.group(1))
    return re.findall(r"\s(-m(?!\s)\S+)", found.group(1))


@pytest.mark.parametrize(("target", "expected"), [("test", COMMIT), ("test-release", RELEASE)])
def test_a_target_runs_one_tier(target: str, expected: set[str], tmp_path: Path) -> None:
    """With the suite's own settings and the target's own words, on a file that has every kind of test."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_tiers.py").write_text(TESTS)
    words = ("--collect-only", "-q", "--no-cov", *selection(target))
    shown = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert set(re.findall(r"::(test_\S+)", shown.stdout)) == expected


SLOW_TESTS = """
import time
import pytest
TOGETHER = {together}

@pytest.mark.parametrize("i", range(2))
def test_slow(i):
    time.sleep(0.2)
"""
MODULES = {
    **{f"unit/test_{i}.py": None for i in range(4)},
    **{f"server/test_{i}.py": None for i in range(4)},
    **{f"engine/test_{i}.py": "shared" for i in range(3)},
}
"""Modules of tests, and what those are called that must not be parted."""


def test_two_processes_run_each_module_once(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, together in MODULES.items():
        file = tmp_path / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SLOW_TESTS.format(together=repr(together)))
    for folder in ("", "unit", "server", "engine"):
        (tmp_path / "tests" / folder / "__init__.py").touch()
    shutil.copy(ROOT / "tests" / "module_queue.py", tmp_path / "tests")
    (tmp_path / "queue").mkdir()
    words = [sys.executable, "-m", "pytest", "-ptests.module_queue", "--no-cov", "-v", "-pno:randomly"]
    processes = [
        subprocess.Popen(
            words,
            cwd=tmp_path,
            env={**os.environ, "SUITE_QUEUE": str(tmp_path / "queue"), "SUITE_SERVERS": servers},
            stdout=subprocess.PIPE,
            text=True,
        )
        for servers in ("1", "")
    ]
    shown = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    ran = [re.findall(r"tests/(\S+)::(test_slow\[\d\]) PASSED", each) for each in shown]
    assert sorted(ran[0] + ran[1]) == sorted((name, f"test_slow[{i}]") for name in MODULES for i in range(2))
    for each, begins_with_servers in zip(ran, (True, False), strict=True):
        if each:  # one may start when the other is done
            assert each[0][0].startswith("server/") == begins_with_servers
    modules = [{name for name, _ in each} for each in ran]
    assert not modules[0] & modules[1]
    together = {name for name, shared in MODULES.items() if shared}
    assert together <= modules[0] or together <= modules[1]


@pytest.fixture(scope="module")
def whole_suite() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "deploy" / "environment"))
        yield importlib.import_module("whole_suite")


def test_the_release_tier_has_the_tests_of_the_engine_on_both_runners(whole_suite: ModuleType) -> None:
    assert [*whole_suite.runs(["--randomly-seed=1"])] == [(["--randomly-seed=1"], {})]
    (measured,) = whole_suite.runs([whole_suite.COVERED, "--randomly-seed=1"])
    assert measured == ([*whole_suite.MEASURED, "--randomly-seed=1"], {})
    release, v2 = whole_suite.runs(["-mrelease", "--randomly-seed=1"])
    assert release == (["-mrelease", "--randomly-seed=1"], {VARIABLE: "v1"})
    assert v2 == (["-mrelease", "--randomly-seed=1", *whole_suite.V2_TESTS], {VARIABLE: RUNNERS[0]})
    families, v1 = whole_suite.runs([whole_suite.LEFT_OUT, "--randomly-seed=1"])
    others, few = (
        {VARIABLE: runner, whole_suite.FAMILIES: each} for runner, each in ((RUNNERS[0], "others"), ("v1", "few"))
    )
    assert families == (["--randomly-seed=1", *whole_suite.FAMILY_TESTS], others)
    assert v1 == (["--randomly-seed=1", *whole_suite.V1_TESTS], few)
    named = (*whole_suite.V1_TESTS, *whole_suite.V2_TESTS, *whole_suite.FAMILY_TESTS)
    assert all((ROOT / path).exists() for path in named)


def test_no_test_is_left_out_of_every_run(whole_suite: ModuleType) -> None:
    """Tests that V1 skips, and that `make test` leaves to the release tier, are in its run on V2."""
    skipped = re.compile(r"mark\.skipif\(not runner\.is_v2\(\)")
    modules = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    of_v2_alone = {path for path in modules if skipped.search(text := path.read_text()) and "mark.release" in text}
    assert of_v2_alone
    assert of_v2_alone <= {ROOT / path for path in whole_suite.V2_TESTS}


@pytest.mark.release
def test_every_test_of_a_family_has_its_turn_with_the_others(whole_suite: ModuleType) -> None:
    """A module whose tests take the families one by one is in the run of those that `make test` leaves out."""

    def collected(families: str) -> dict[str, set[str]]:
        words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-cov", "tests/engine"]
        environment = {**os.environ, whole_suite.FAMILIES: families}
        shown = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        found: dict[str, set[str]] = {}
        for module, test in re.findall(r"^(tests/engine/\S+?)::(.+)$", shown, flags=re.MULTILINE):
            found.setdefault(module, set()).add(test)
        return found

    each_commit, others, everything = map(collected, ("", "others", "all"))
    differing = {module for module in everything if everything[module] != each_commit[module]}
    assert differing == {*whole_suite.FAMILY_TESTS}
    for module in everything:
        # An empty list of parameters makes one test that is skipped.
        tests = each_commit[module] | others.get(module, set())
        assert {test for test in tests if "NOTSET" not in test} == everything[module]


def test_continuous_integration_runs_both() -> None:
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("the sdist has no .ci")
    assert re.findall(r"^(?:exec )?make (\S+)$", script.read_text(), flags=re.MULTILINE) == [
        "test",
        "test-release",
    ]
