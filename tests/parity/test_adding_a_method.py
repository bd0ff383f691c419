"""Adding a method is adding one file: every reader finds it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import example

ROOT = Path(__file__).parents[2]
# The guide's own example, under a name that no test has.
THROWAWAY = example("method").replace('"last"', '"throwaway"').replace("class Last", "class Throwaway")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and the suite with one file more."""
    directory = tmp_path_factory.mktemp("copy")
    for folder in ("promprune_vllm", "tests", "deploy"):
        ignore = shutil.ignore_patterns("__pycache__", "photos", "promprune.npz")
        shutil.copytree(ROOT / folder, directory / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", directory)
    (directory / "promprune_vllm" / "methods" / "throwaway.py").write_text(THROWAWAY)
    return directory


def _run(copy: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=copy, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_command_line_lists_it(copy: Path) -> None:
    (row,) = [
        row for row in json.loads(_run(copy, "promprune_vllm", "methods", "--json")) if row["name"] == "throwaway"
    ]
    assert row["options"] == {}
    assert row["summary"] == "The last tokens in raster order."


def test_the_generated_table_has_it(copy: Path) -> None:
    assert "| `throwaway` | control | projected |" in _run(copy, "promprune_vllm", "methods", "--markdown")


def test_the_contract_suite_takes_it(copy: Path) -> None:
    suite = ("pytest", "tests/unit/test_contract.py", "-k", "throwaway", "-q", "-p", "no:cacheprovider")
    assert "passed" in _run(copy, *suite)
