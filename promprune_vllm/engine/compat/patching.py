"""How vLLM is patched: only by rows of ``patches``."""

from __future__ import annotations

import enum
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from promprune_vllm.engine.compat import verdict, versions
from promprune_vllm.engine.compat.parts import Part
from promprune_vllm.engine.compat.seam import Seam
from promprune_vllm.engine.keys import PATCHED_BY
from promprune_vllm.errors import IncompatibleVllmError

_ENGINE = "promprune_vllm.engine"


class Stage(enum.Enum):
    """When patches are installed: in which process, and at what moment."""

    PLUGIN = "every process, when vLLM loads the plugin"
    LOAD = "every process, when vLLM loads the plugin, only if budgets adapt to load or answers are audited"
    AUDIT = "every process, when vLLM loads the plugin, only if answers are audited"
    REPLIES = "API server and `vllm run-batch`, when the renderer is created"
    SCHEDULER = "engine core, when it selects its scheduler class"
    PROCESSOR = "every process that preprocesses images, when our processor is imported"
    WORKER = "worker, when a pruned model is created"
    WORKER_V1 = "worker with Model Runner V1, when a pruned model is created"
    WORKER_V2 = "worker with Model Runner V2, when a pruned model is created"
    WORKER_CPU = "worker on a CPU, when a pruned model is created"
    MROPE_CPU = "worker on a CPU, when a pruned model with M-RoPE is created"
    REFUSAL = "every process, when vLLM loads the plugin, only if no engine may start"
    COMMAND = "`promprune serve` and `promprune vllm`, before vLLM's command line runs"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why vLLM is patched.

    Args:
        part: The part of this release that does not run without the patch.
        feature: What users gain from the patch.
        why: Why the feature needs a patch.
        until: The change in vLLM that would make the patch unnecessary.
    """

    part: Part
    feature: str
    why: str
    until: str


@dataclass(frozen=True, slots=True)
class Patch:
    """One function that is replaced, wrapped or added.

    Args:
        target: ``"module:name"`` or ``"module:Class.name"`` of the patched function.
        wrapper: ``"module:function"`` below ``promprune_vllm.engine``. It takes the original and returns the
            replacement; ``None`` is the original of a target that we add.
        seam: The target's seam, or that of its class if the class inherits the target.
        stage: When the patch is installed.
        reason: Why the patch exists; several rows may share one.
        only_if_loaded: The target may be left alone where its module is not loaded.
    """

    target: str
    wrapper: str
    seam: Seam
    stage: Stage
    reason: Reason
    only_if_loaded: bool = False

    @property
    def applies(self) -> bool:
        """Whether this vLLM has the target, and the reason's part runs on it."""
        if not self.seam.in_minor(versions.installed_minor()) or verdict.current().is_off(self.reason.part):
            return False
        return not self.only_if_loaded or self.module in sys.modules

    @property
    def module(self) -> str:
        """The module that defines the target."""
        return self.target.partition(":")[0]

    def require(self) -> None:
        """Raise ``IncompatibleVllmError`` unless the target matches its seam."""
        if self.seam.use != "add":
            self.seam.require()
            return
        owner, name = self.owner()
        if hasattr(owner, name) and not _wrappers(getattr(owner, name)):
            raise IncompatibleVllmError(
                f"promprune-vllm adds {self.target}, but this vLLM already has one of its own."
            )

    def owner(self) -> tuple[Any, str]:
        """Return the class or module that has the target, and the target's name in it."""
        *parents, name = self.target.partition(":")[2].split(".")
        return functools.reduce(getattr, parents, importlib.import_module(self.module)), name


def wrap(patch: Patch) -> None:
    """Replace a row's target with the result of its wrapper. Idempotent.

    Several rows may have the same target; a later one wraps the earlier ones.
    """
    owner, name = patch.owner()
    original = getattr(owner, name, None)
    applied = _wrappers(original)
    if patch.wrapper in applied:
        return
    module, _, function = patch.wrapper.partition(":")
    wrapper: Callable[[Any], Any] = getattr(importlib.import_module(f"{_ENGINE}.{module}"), function)
    replacement = wrapper(original)
    if original is not None:
        replacement = functools.wraps(original)(replacement)
    function_object = replacement.fget if isinstance(replacement, property) else replacement
    setattr(function_object, PATCHED_BY, (*applied, patch.wrapper))
    setattr(owner, name, replacement)


def _wrappers(function: Any) -> tuple[str, ...]:
    function_object = function.fget if isinstance(function, property) else function
    wrappers: tuple[str, ...] = getattr(function_object, PATCHED_BY, ())
    return wrappers
