"""How vLLM is extended in place: by rows of ``patches``, and by nothing else."""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from promprune_vllm.engine.compat import versions
from promprune_vllm.engine.keys import PATCHED_BY
from promprune_vllm.errors import IncompatibleVllmError

_ENGINE = "promprune_vllm.engine"


class Stage(enum.Enum):
    """When patches are installed: in which process, and on what occasion."""

    PLUGIN = "every process, when vLLM loads the plugin"
    LOAD = "every process, when vLLM loads the plugin and budgets adapt to load"
    REPLIES = "API server and `vllm run-batch`, when they make the renderer of requests"
    SCHEDULER = "engine core, when it picks its scheduler"
    PROCESSOR = "processes that process images, when our processor is imported"
    WORKER = "worker, when a pruned model is made"
    WORKER_V1 = "worker with Model Runner V1, when a pruned model is made"
    WORKER_V2 = "worker with Model Runner V2, when a pruned model is made"
    WORKER_CPU = "worker on a CPU, when a pruned model is made"
    MROPE_CPU = "worker on a CPU, when a pruned model with M-RoPE is made"
    COMMAND = "`promprune serve` and `promprune vllm`, before vLLM's command line runs"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why vLLM is patched.

    Args:
        feature: What a user has of it.
        why: Why that takes a patch.
        until: The change of vLLM's that would let us delete it.
    """

    feature: str
    why: str
    until: str


@dataclass(frozen=True, slots=True)
class Patch:
    """One function that is replaced, wrapped or added.

    Args:
        target: ``"module:name"`` or ``"module:Class.name"`` of what is patched.
        wrapper: ``"module:function"`` below ``promprune_vllm.engine``; called with the original, it returns what
            takes its place.
        takes: Parameters of the original that the wrapper relies on.
        stage: When it is installed.
        reason: Why; several rows may share one.
        adds: The class does not have it; the wrapper gets ``None``.
        presence: ``"required"``, or what it takes to be patched: that the module is ``"installed"``, or that some
            other part of vLLM has ``"loaded"`` it.
        since: First minor with this target, where older ones have none.
        before: First minor without it, where newer ones have none.
    """

    target: str
    wrapper: str
    takes: tuple[str, ...]
    stage: Stage
    reason: Reason
    adds: bool = False
    presence: Literal["required", "installed", "loaded"] = "required"
    since: str | None = None
    before: str | None = None

    @property
    def applies(self) -> bool:
        """Whether this vLLM has the target."""
        if (self.since and versions.before(self.since)) or (self.before and not versions.before(self.before)):
            return False
        if self.presence == "installed":
            return _is_installed(self.module)
        return self.presence == "required" or self.module in sys.modules

    @property
    def module(self) -> str:
        """The module that has the target."""
        return self.target.partition(":")[0]

    def require(self) -> None:
        """Raise ``IncompatibleVllmError`` unless the target is as this row says."""
        if not self.adds:
            versions.require_names({self.target: self.takes})
            return
        versions.require_names({f"{self.target.rpartition('.')[0]}.__init__": ()})
        owner, name = self.owner()
        if hasattr(owner, name) and not _wrappers(getattr(owner, name)):
            raise IncompatibleVllmError(f"promprune-vllm adds {self.target}, and this vLLM has one of its own.")

    def owner(self) -> tuple[Any, str]:
        """Return the class or module that has the target, and its name there."""
        *parents, name = self.target.partition(":")[2].split(".")
        return functools.reduce(getattr, parents, importlib.import_module(self.module)), name


def wrap(patch: Patch) -> None:
    """Put what a row's wrapper makes in the place of its target. Idempotent.

    Several rows may have one target; a later one goes around the earlier ones.
    """
    owner, name = patch.owner()
    original = getattr(owner, name, None)
    there = _wrappers(original)
    if patch.wrapper in there:
        return
    module, _, function = patch.wrapper.partition(":")
    wrapper: Callable[[Any], Any] = getattr(importlib.import_module(f"{_ENGINE}.{module}"), function)
    made = wrapper(original)
    if original is not None:
        made = functools.wraps(original)(made)
    marked = made.fget if isinstance(made, property) else made
    setattr(marked, PATCHED_BY, (*there, patch.wrapper))
    setattr(owner, name, made)


def _wrappers(function: Any) -> tuple[str, ...]:
    found = function.fget if isinstance(function, property) else function
    wrappers: tuple[str, ...] = getattr(found, PATCHED_BY, ())
    return wrappers


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
