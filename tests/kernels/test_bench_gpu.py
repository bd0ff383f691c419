"""``promprune bench gpu`` is killed: what it leaves is complete, and nothing of it goes on running."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from promprune_vllm.bench.gpu import text
from promprune_vllm.bench.gpu.report import JSON, MARKDOWN, read

PATIENCE_SECONDS = 120


def test_a_run_that_is_killed_leaves_valid_files_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    words = ("bench", "gpu", "--out", str(out), "--device", "cpu", "--shape", "tiny", "--only", "kernels")
    process = subprocess.Popen([sys.executable, "-m", "promprune_vllm", *words], stderr=subprocess.DEVNULL)
    try:
        seen = _wait_for_stage(out, "kernels 60x80:9", process)
        below = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    document = read(out)
    assert [each["state"] for each in document["stages"]] == [each["state"] for each in seen["stages"]]
    assert [each["state"] for each in document["stages"]] == ["done", "running"]
    assert document["stages"][0]["result"]["gpu"] is None
    assert document["ended"] is False
    assert (out / MARKDOWN).read_text() == text.markdown(document)
    assert below
    _, alive = psutil.wait_procs(below, timeout=PATIENCE_SECONDS)
    assert alive == []


def _wait_for_stage(out: Path, name: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Read the file again and again, which is never half written, until a stage runs in a process of its own."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if (out / JSON).exists():
            document: dict[str, Any] = json.loads((out / JSON).read_text())
            states = {each["name"]: each["state"] for each in document["stages"]}
            if states[name] == "running" and psutil.Process(process.pid).children():
                return document
        time.sleep(0.01)
    raise AssertionError(f"{name} did not start")
