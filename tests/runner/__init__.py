"""Which of vLLM's model runners the tests run on: ``PROMPRUNE_TEST_RUNNER``, for this process and all it starts.

On a CPU the default is Model Runner V2 with asynchronous scheduling, as on every GPU; ``runner_hooks`` says how.
With vLLM's build for GPUs, only ``v1`` changes anything.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.runner.children import runner_hooks
from tests.runner.children.runner_hooks import chosen

__all__ = ["chosen", "in_force", "is_v2", "missing", "python_path", "schedules_ahead", "use"]
CHILDREN = Path(__file__).parent / "children"
"""The folder on ``PYTHONPATH`` that brings the runner to processes that tests start."""


def use() -> None:
    """Choose the runner, here and in what is started from now on; before vLLM is imported."""
    os.environ[runner_hooks.VARIABLE] = chosen()
    os.environ["PYTHONPATH"] = python_path(CHILDREN)
    runner_hooks.install()


def python_path(*folders: Path) -> str:
    """Return ``PYTHONPATH`` with folders before those that it has; set without this, it would lose the runner."""
    there = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    wished = [*map(str, folders), *filter(None, there)]
    return os.pathsep.join(dict.fromkeys(wished))


def is_v2() -> bool:
    return chosen() != "v1"


def schedules_ahead() -> bool:
    return chosen() == "v2-async"


def in_force(log: str) -> str:
    """Return the runner that a server's log tells of."""
    if "Using V2 Model Runner" not in log:
        return "v1"
    return "v2" if f"{runner_hooks.SCHEDULES_AHEAD} False" in log else "v2-async"  # the default, with a GPU


def missing() -> str | None:
    """Return why the chosen runner cannot be had, or ``None``."""
    if not is_v2() or runner_hooks.has_triton():
        return None
    return (
        f"Model Runner V2 needs Triton, which is not in {runner_hooks.TRITON}: `make test` installs it "
        f"(deploy/environment/setup_env.py --triton), or set {runner_hooks.VARIABLE}=v1"
    )
