"""Runs the stages within the time limit, and writes the report after each step of each."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from promprune_vllm.bench.gpu.clock import Deadline, allowance
from promprune_vllm.bench.gpu.report import Report
from promprune_vllm.bench.gpu.shapes import GROUPS, SHAPES
from promprune_vllm.bench.gpu.stages import Stage, stages
from promprune_vllm.bench.provenance import provenance
from promprune_vllm.demo.supervisor import GRACE_SECONDS
from promprune_vllm.errors import BenchError

RESERVE_SECONDS = GRACE_SECONDS + 5
"""Time for the last stage's process to end by itself before it is killed."""


def run(
    out: Path,
    *,
    device: str,
    shape: str,
    minutes: float,
    only: Sequence[str],
    commit: str | None,
    tell: Callable[[str], None],
) -> Report:
    """Measure everything that fits into the time, and return the report.

    Args:
        out: Folder of the report and the logs.
        device: ``cuda``; ``cpu`` for a rehearsal.
        shape: A key of ``SHAPES``.
        minutes: Time limit.
        only: Groups of stages to run besides the environment; by default all.
        commit: Commit of the code if this is a copy of a checkout without its ``.git``.
        tell: Called with a line of text for each stage.

    Raises:
        BenchError: A value that is not possible, or the folder has a report.
    """
    started = time.monotonic()
    _require(device, shape, only)
    by = provenance()
    head = {
        "shape": shape,
        "device": device,
        "minutes": minutes,
        "provenance": {**by, "commit": by["commit"] or commit},
    }
    plan = stages(SHAPES[shape], device, out, only)
    report = Report(out, head, [stage.name for stage in plan])
    run_stages(plan, report, Deadline(started + max(0, 60 * minutes - RESERVE_SECONDS)), tell)
    report.end(time.monotonic() - started)
    return report


def _require(device: str, shape: str, only: Sequence[str]) -> None:
    if device not in ("cpu", "cuda"):
        raise BenchError(f"--device must be cpu or cuda, got {device!r}.")
    if shape not in SHAPES:
        raise BenchError(f"--shape must be one of {', '.join(SHAPES)}, got {shape!r}.")
    if unknown := sorted(set(only) - set(GROUPS)):
        raise BenchError(f"--only must be one of {', '.join(GROUPS)}, got {unknown[0]!r}.")
    rehearsal = "To rehearse on a CPU: --device cpu --shape tiny."
    if device == "cpu" and shape != "tiny":
        raise BenchError(f"--device cpu: {shape} would take hours on a CPU. {rehearsal}")
    if device == "cuda":
        import torch  # takes seconds, which count

        if torch.cuda.is_available():
            return
        raise BenchError(f"--device cuda: torch sees no CUDA device here. {rehearsal}")


def run_stages(plan: Sequence[Stage], report: Report, deadline: Deadline, tell: Callable[[str], None]) -> None:
    """Run stages one after the other; one that fails does not end the run.

    A stage that cannot run here, or for which no time is left, is skipped. The time of the others is divided anew
    before each.
    """
    for stage in plan:
        if stage.missing:
            report.put(stage.name, "skipped", why=stage.missing)
    able = [stage for stage in plan if not stage.missing]
    for i, stage in enumerate(able):
        left = deadline.left()
        seconds = allowance([each.cost for each in able[i:]], left)
        if not seconds:
            needed = f"it no longer fits: it needs about {stage.cost.least:.0f} s, and {left:.0f} s are left"
            report.put(stage.name, "skipped", why=needed)
        else:
            tell(f"{stage.name}: at most {seconds:.0f} s …")
            _run_stage(stage, report, Deadline.after(seconds))
        tell(_told(report.stages[stage.name]))


def _run_stage(stage: Stage, report: Report, deadline: Deadline) -> None:
    """Run a stage and record every result that it yields, and how it ended."""
    started = time.monotonic()

    def end(state: Any, **fields: object) -> None:
        report.put(stage.name, state, seconds=round(time.monotonic() - started, 1), **fields)

    report.put(stage.name, "running")
    try:
        with closing(stage.measure(deadline)) as results:
            for result in results:
                report.put(stage.name, "running", result=result)
    except TimeoutError as error:
        end("cut off", why=str(error))
    except subprocess.TimeoutExpired:
        end("cut off", why=f"it was stopped after its {time.monotonic() - started:.0f} s")
    except Exception as error:  # whatever it is, the other stages are still worth running
        end("failed", why=f"{type(error).__name__}: {error}")
    except BaseException as error:
        end("cut off", why=f"the run was ended: {type(error).__name__} {error}".strip())
        raise
    else:
        end("done")


def _told(stage: dict[str, Any]) -> str:
    why = f": {stage['why']}" if "why" in stage else ""
    return f"{stage['name']}: {stage['state']}{why}"
