"""What a newcomer does first: clone, ``make demo``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import VISUAL_TOKENS

pytestmark = [pytest.mark.server, pytest.mark.release]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    directory = tmp_path / "clone"
    made = subprocess.run(
        ["git", "clone", "-q", str(ROOT), str(directory)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"this is not a git checkout that can be cloned: {made.stderr.strip()}")
    return directory


@pytest.mark.timeout(2000)
def test_make_demo_in_a_fresh_clone_and_again(clone: Path) -> None:
    assert not (clone / ".venv").exists()
    said = demo(clone)
    assert "creating" in said
    said = demo(clone)
    assert "is up to date" in said
    assert "creating" not in said


def demo(clone: Path) -> str:
    """Run `make demo`, judge what it found, and return what it said on the way."""
    # As in a newcomer's shell, which is not itself started by `make test-release`.
    ours = ("MAKEFLAGS", "MAKELEVEL", "PYTHONPATH", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PROMPRUNE_CACHE": str(clone / "cache"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    result = subprocess.run(
        ["make", "demo", "ARGS=--once --json"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    rows = document["rows"]
    assert rows[0]["answer"] == document["right_answer"]
    assert [row["budget"] for row in rows] == [None, 256, 128, 64]
    assert [row["seen"] for row in rows] == [VISUAL_TOKENS] * 4
    assert [row["kept"] for row in rows] == [VISUAL_TOKENS, 256, 128, 64]
    full, *pruned = rows
    for row in pruned:
        assert full["prompt_tokens"] - row["prompt_tokens"] == VISUAL_TOKENS - row["kept"]
        assert row["selection_ms"] > 0
        assert full["kv_blocks"] - row["kv_blocks"] == (VISUAL_TOKENS - row["kept"]) // 32
    assert full["selection_ms"] is None
    return result.stderr
