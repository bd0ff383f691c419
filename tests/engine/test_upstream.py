"""What docs/upstream.md reports to vLLM is still so: its scripts run, and print what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
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
@pytest.mark.parametrize(
    "script",
    [
        "mrope_bfloat16.py",
        "vidcom2_frame.py",
        "cpu_linear.py",
        "cpu_seed.py",
        "refused_media.py",
        "one_frame_video.py",
    ],
)
def test_a_fault_is_still_as_reported(script: str) -> None:
    printed = run(script)
    assert set(shown(script)) <= set(printed)


@pytest.mark.release
@pytest.mark.parametrize(
    ("script", "family"),
    [
        ("mrope_prefix_cache.py", "qwen2_5_vl"),
        ("cpu_video_pruning.py", "qwen2_5_vl"),
        ("unsent_image.py", "qwen2_5_vl"),
        ("preempted_image.py", "llava"),
        ("two_videos.py", "llava_onevision"),
    ],
)
def test_a_fault_of_a_family_is_still_as_reported(script: str, family: str, tmp_path: Path) -> None:
    build_family_model(family, tmp_path / "model")
    printed = run(script, str(tmp_path / "model"))
    assert set(shown(script)) <= set(printed)


@pytest.mark.release
def test_tiles_are_counted_as_reported(tmp_path: Path) -> None:
    model = build_family_model("internvl", tmp_path / "model")
    for file in model.glob("*.json"):  # as published checkpoints say
        file.write_text(file.read_text().replace('"crop_to_patches": true', '"crop_to_patches": false'))
    printed = run("internvl_tiles.py", str(model))
    assert set(shown("internvl_tiles.py")) <= set(printed)


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


def test_the_letter_to_the_rfc_counts_the_patches_that_each_hook_would_drop() -> None:
    """Only fixes, the end of older minors and another package are left: no hook of vLLM drops those."""
    from promprune_vllm.engine.patches import PATCHES

    told = dict(re.findall(r"^> \| (.+?) \| .+ \| (\d+) \|$", PAGE.read_text(), flags=re.MULTILINE))
    rows = Counter(patch.reason.until for patch in PATCHES)
    assert {hook: int(count) for hook, count in told.items()} == {hook: rows[hook] for hook in told}
    assert {until for until in rows if until not in told} == {
        "a fix of this bug in vLLM",
        "the end of support for older vLLM minors",
        "a CPU build of vLLM under the package name vllm",
    }
