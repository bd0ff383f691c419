"""The type of a seam: one function or class of vLLM that this release depends on. ``seams`` has all of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from promprune_vllm.engine.compat import parts, versions
from promprune_vllm.engine.compat.parts import Kind, Part
from promprune_vllm.errors import IncompatibleVllmError

Use = Literal["call", "wrap", "rely", "add"]
Tier = Literal["core", "side", "call"]


@dataclass(frozen=True, slots=True)
class Seam:
    """One function or class of vLLM that a part depends on.

    Args:
        name: ``"module:function"``, ``"module:Class"`` or ``"module:Class.method"``.
        use: We call or override it, wrap it (a row of ``patches``), only rely on what it does, or add it.
        takes: Parameters of a function, or fields of a class, that we use.
        body: Its code matters, not only its parameters.
        words: With ``body``: only the statements with one of these names matter.
        since: First minor that has it.
        before: First minor that no longer has it.
        part: What depends on it.
    """

    name: str
    use: Use
    takes: tuple[str, ...] = ()
    body: bool = False
    words: tuple[str, ...] = ()
    since: str | None = None
    before: str | None = None
    part: Part = parts.REQUESTS

    @property
    def tier(self) -> Tier:
        """What a change of the seam's code means: ``call`` if only its parameters matter."""
        if not self.body:
            return "call"
        return "side" if self.part.kind is Kind.FEATURE else "core"

    @property
    def key(self) -> str:
        """The seam's key in ``fingerprints.json``: parts that rely on the same statements share it."""
        return f"{self.name}[{','.join(self.words)}]" if self.words else self.name

    def in_minor(self, minor: str) -> bool:
        """Whether a vLLM minor has the seam."""
        return not (
            (self.since and versions.is_before(minor, self.since))
            or (self.before and not versions.is_before(minor, self.before))
        )

    def require(self) -> None:
        """Raise ``IncompatibleVllmError`` unless the installed vLLM has the seam with the parameters we use."""
        module, _, name = self.name.partition(":")
        try:
            target: Any = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            function: Any = target.fget if isinstance(target, property) else target
            actual = inspect.signature(function).parameters
        except (ImportError, AttributeError) as error:
            raise IncompatibleVllmError(
                f"promprune-vllm relies on {self.name}, which this vLLM lacks ({error}). {versions.NEXT_STEP}"
            ) from error
        missing = [parameter for parameter in self.takes if parameter not in actual]
        if missing:
            raise IncompatibleVllmError(
                f"promprune-vllm relies on {self.name} taking {', '.join(missing)}, but in this vLLM it does not. "
                f"{versions.NEXT_STEP}"
            )


def of(part: Part, *seams: Seam) -> Iterable[Seam]:
    """Return seams with the part that depends on them."""
    return [replace(seam, part=part) for seam in seams]


def _builder(use: Use) -> Callable[..., Seam]:
    def build(name: str, *takes: str, **more: Any) -> Seam:
        return Seam(name, use, takes, **{"body": "words" in more, **more})

    return build


call, wrap, rely = _builder("call"), _builder("wrap"), _builder("rely")


def add(name: str, **more: Any) -> Seam:
    """A method that we add: vLLM must not have it."""
    return Seam(name, "add", **more)
