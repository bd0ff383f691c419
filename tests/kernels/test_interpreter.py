"""Runs the tests of this folder where Triton is, if it is not here; see conftest."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import HAS_TRITON

TRITON = Path(sys.prefix) / "triton-only"


@pytest.mark.skipif(HAS_TRITON, reason="Triton is in this environment: the tests beside this one ran directly")
@pytest.mark.parametrize("interpreted", ["1", "0"], ids=["interpreted", "compiled"])
def test_the_kernels_of_the_cuda_path(interpreted: str) -> None:
    if not (TRITON / "triton").is_dir():
        pytest.skip(f"there is no Triton in {TRITON}: `make test` installs it")
    files = ["test_triton.py", "test_no_sync.py"] if interpreted == "1" else ["test_compiled.py"]
    # The interpreter's products are numpy's. With fused multiply-add, OpenBLAS rounds by a row's place on
    # some CPUs, and equal tokens would not tie. This core type has none, and vLLM's CPUs can run it.
    core = {"OPENBLAS_CORETYPE": "Sandybridge"} if platform.machine() == "x86_64" else {}
    environment = os.environ | {"PYTHONPATH": str(TRITON), "TRITON_INTERPRET": interpreted} | core
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(Path(__file__).with_name(name)) for name in files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=550)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
