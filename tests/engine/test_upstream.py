"""What docs/upstream.md reports to vLLM is still so: its scripts run, and print what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from promprune_vllm.demo.families import build_family_model
from tests.conftest import UNMEASURED
from tests.documents import ROOT
from tests.engine.small_steps import name_spare_token
from tests.runner.children.runner_hooks import VARIABLE

pytestmark = pytest.mark.engine
SCRIPTS = ROOT / "docs" / "repro"
PAGE = ROOT / "docs" / "upstream.md"


def shown(script: str) -> list[str]:
    """The lines that the page shows as printed, behind the script's name."""
    found = re.search(rf"repro/{script}\).*?\n```\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert found, f"{PAGE.name} does not show what {script} prints"
    return found.group(1).splitlines()


def run(script: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **UNMEASURED, VARIABLE: "v1"},  # as users run them
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 1, f"{script} finds nothing wrong any more:\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()


@pytest.mark.release  # of vLLM alone: no commit of ours changes it
@pytest.mark.parametrize("script", ["mrope_portrait.py", "mrope_two_images.py"])
def test_positions_are_wrong_as_reported(script: str) -> None:
    printed = run(script)
    assert set(shown(script)) <= set(printed)


@pytest.mark.release
def test_a_step_encodes_more_than_its_budget_as_reported(tmp_path: Path) -> None:
    build_family_model("qwen2_5_vl", tmp_path / "model")
    printed = run("encoder_budget.py", str(tmp_path / "model"))
    assert set(shown("encoder_budget.py")) <= set(printed)


@pytest.mark.release
def test_a_server_ends_at_an_id_without_a_name_as_reported() -> None:
    printed = run("unnamed_token.py")
    assert set(shown("unnamed_token.py")) <= set(printed)


@pytest.mark.release
def test_embeddings_beside_an_image_end_an_engine_as_reported(tmp_path: Path) -> None:
    model = build_family_model("qwen3_vl", tmp_path / "model")
    name_spare_token(model)
    printed = run("prompt_embeds_deepstack.py", str(model))
    assert set(shown("prompt_embeds_deepstack.py")) <= set(printed)


def test_every_script_is_reported_and_tried() -> None:
    named = set(re.findall(r"\(repro/(\w+\.py)\)", PAGE.read_text()))
    assert named == {script.name for script in SCRIPTS.glob("*.py")}
    tried = Path(__file__).read_text()
    assert all(script in tried for script in named)
