"""Commands that a stage runs in a process of its own: a fault of CUDA ends that process, not the run."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promprune_vllm.bench.gpu.clock import Deadline
from promprune_vllm.demo.processes import supervised
from promprune_vllm.errors import BenchError

PROMPRUNE = (sys.executable, "-m", "promprune_vllm")
_LINES = 15


def json_of(words: Sequence[str], deadline: Deadline) -> dict[str, Any]:
    """Run a command and return the JSON document that it prints.

    Raises:
        BenchError: It failed, or printed something else; includes the end of its output.
        subprocess.TimeoutExpired: The time is over; the command was stopped.
    """
    with tempfile.TemporaryDirectory(prefix="promprune-gpu-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        out, err = folder / "out", folder / "err"
        with (
            out.open("wb") as printed,
            err.open("wb") as said,
            supervised(words, folder=folder, stdout=printed, stderr=said) as process,
        ):
            process.wait(deadline.left())
        if process.returncode:
            end = end_of(err) or end_of(out)
            raise BenchError(f"{shlex.join(words)} exited with status {process.returncode}:\n{end}")
        try:
            document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BenchError(f"{shlex.join(words)} printed no JSON ({error}):\n{end_of(out)}") from error
    return document


def end_of(file: Path) -> str:
    """Return the last lines of a file."""
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LINES:])
