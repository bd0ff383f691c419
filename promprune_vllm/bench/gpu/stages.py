"""The stages of a run, in order of value per second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from promprune_vllm.bench.gpu import child, kernel_tests
from promprune_vllm.bench.gpu.clock import Cost, Deadline
from promprune_vllm.bench.gpu.shapes import Shape

Results = Generator[dict[str, Any], None, None]


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a run.

    Args:
        name: Its group, and a space and a case if the group has several.
        cost: Its time.
        measure: Yields what it has measured so far, each time completely.
        missing: Why it cannot run here, or an empty text.
    """

    name: str
    cost: Cost
    measure: Callable[[Deadline], Results]
    missing: str = ""

    @property
    def group(self) -> str:
        """The first word of its name."""
        return self.name.partition(" ")[0]


def stages(shape: Shape, device: str, out: Path, only: Sequence[str] = ()) -> list[Stage]:
    """Return the stages of a shape.

    Args:
        shape: What to measure.
        device: ``cpu`` or ``cuda``.
        out: Folder for logs.
        only: Groups to run besides the environment; by default all.
    """
    kind = "bfloat16" if device == "cuda" else "float32"
    words = ("--device", device, "--json")
    found = [
        Stage("environment", shape.costs["environment"], _environment),
        Stage(
            "tests",
            shape.costs["tests"],
            partial(kernel_tests.measure, shape.tests, out),
            kernel_tests.missing(),
        ),
    ]
    for case in shape.kernels:
        measure = partial(_command, ("bench", "kernels", *words, "--dtype", kind, "--case", case))
        found.append(Stage(f"kernels {case}", shape.costs["kernels"], measure))
    for model in shape.prefill:
        measure = partial(_command, ("bench", "prefill", *words, "--model", model))
        found.append(Stage(f"prefill {model}", shape.costs["prefill"], measure))
    absent = "" if find_spec("vllm") else "vllm cannot be imported: `pip install 'promprune-vllm[cuda]'`"
    found.append(Stage("vllm", shape.costs["vllm"], partial(_vllm, shape, device, out), absent))
    return [stage for stage in found if not only or stage.group in (*only, "environment")]


def _environment(deadline: Deadline) -> Results:
    yield child.json_of((sys.executable, "-m", "promprune_vllm.bench.gpu.environment"), deadline)


def _command(words: tuple[str, ...], deadline: Deadline) -> Results:
    yield child.json_of((*child.PROMPRUNE, *words), deadline)


def _vllm(shape: Shape, device: str, out: Path, deadline: Deadline) -> Results:
    from promprune_vllm.bench.gpu import engine

    yield from engine.measure(shape, device, out, deadline)
