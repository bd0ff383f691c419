"""Every test is in exactly one tier: `make test` runs it, or `make test-release` does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT

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


def test_continuous_integration_runs_both() -> None:
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("the sdist has no .ci")
    assert re.findall(r"^(?:exec )?make (\S+)$", script.read_text(), flags=re.MULTILINE) == [
        "test",
        "test-release",
    ]
