"""The runners that the suite is not run on, and whether its tests on Model Runner V2 miss a missing patch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.patches import PATCHES
from tests import runner
from tests.documents import ROOT
from tests.runner import without
from tests.runner.children.runner_hooks import VARIABLE

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not runner.is_v2(), reason="the suite runs on V1 itself")]
HERE = Path(__file__).parent.relative_to(ROOT)
FAILURES = f"{HERE}/test_failures.py"
FAR = f"{HERE}/test_mrope.py::test_positions_beyond_256_are_true_in_bfloat16[qwen2_5_vl]"
WAITS = f"{HERE}/test_waits.py::test_positions_are_written_without_a_wait[qwen2_5_vl-9]"
OF_V1 = (
    f"{HERE}/test_seeds.py",
    f"{HERE}/test_patches.py::test_in_an_offline_program_what_is_patched_is_what_the_rows_say",
    *(FAILURES, FAR),
)
"""What patches V1 alone, or differs by runner."""


def run(*tests: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run tests in a process of their own; what they cover counts."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "PYTHONPATH": runner.python_path(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )


@pytest.mark.parametrize(
    ("name", "tests"),
    [
        pytest.param("v1", OF_V1, id="v1", marks=pytest.mark.release),
        pytest.param("v2", (FAILURES, f"{HERE}/test_preemption.py"), id="v2", marks=pytest.mark.release),
    ],
)
def test_another_runner_passes_what_depends_on_it(name: str, tests: tuple[str, ...]) -> None:
    done = run(*tests, **{VARIABLE: name})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


MISSED = {
    "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.prepare_mm_inputs": FAILURES,
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": FAILURES,
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": FAILURES,
    "vllm.v1.worker.gpu.mm.rope:RopeState.read_prefill_positions": WAITS,
    "promprune_vllm.engine.worker.mrope:_enable_position_hook": FAR,
}
"""What a test would miss -> the test."""


def test_every_patch_of_v2_is_left_out_once() -> None:
    assert {patch.target for patch in PATCHES if patch.stage is Stage.WORKER_V2} <= MISSED.keys()


@pytest.mark.release
@pytest.mark.parametrize("left_out", MISSED)
def test_what_is_left_out_is_missed(left_out: str) -> None:
    # One red test is enough, and a request that waits forever is red too.
    options = ("-x", "--timeout=120", "-p", without.__name__)
    done = run(*options, MISSED[left_out], **{without.VARIABLE: left_out})
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* failed", done.stdout), done.stdout[-2000:]
