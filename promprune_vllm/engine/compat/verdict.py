"""What of the plugin runs on the installed vLLM: everything on a tested version, else what its files allow.

On any other version, the seams in vLLM's files are compared with those of a tested version, once per server: the
process that starts first passes the result to its children. It logs one warning.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from packaging.version import InvalidVersion, Version

from promprune_vllm.config import PREFIX, Settings, allows_untested_vllm
from promprune_vllm.engine.compat import fingerprints, seam_table, versions
from promprune_vllm.engine.compat.parts import Kind, Part
from promprune_vllm.engine.compat.seam import Seam
from promprune_vllm.engine.compat.seam_table import Definition
from promprune_vllm.engine.compat.seams import SEAMS
from promprune_vllm.errors import IncompatibleVllmError

logger = logging.getLogger("vllm.promprune")
_VARIABLE = f"{PREFIX}VLLM_VERDICT"
"""Passes the verdict to child processes."""
_PARTS = {seam.part.name: seam.part for seam in SEAMS}
OVERRIDE = f"{PREFIX}UNTESTED_VLLM=1"
_CODE = "code changed"
_SHOWN = 5  # changes that a message lists


@dataclass(frozen=True, slots=True)
class Verdict:
    """The comparison of the installed vLLM with a tested version.

    Args:
        version: Of the installed vLLM.
        reference: The tested version it was compared with; the same if the installed one was tested.
        seams: Number of seams that were compared; 0 if the version was tested.
        moved: Name of a part -> what changed of it, such as ``"vllm.a:B.c (code changed)"``.
        ignored: The same, for changes that the operator told us to ignore.
    """

    version: str
    reference: str
    seams: int = 0
    moved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def tested(self) -> bool:
        """Whether this release was tested with the installed version."""
        return self.version == self.reference

    def of_kind(self, kind: Kind) -> dict[Part, tuple[str, ...]]:
        """Return the parts of a kind that do not run, with what changed of each."""
        return {_PARTS[name]: moved for name, moved in self.moved.items() if _PARTS[name].kind is kind}

    def is_off(self, part: Part) -> bool:
        """Whether a part does not run."""
        return part.name in self.moved

    def parts(self) -> dict[str, bool]:
        """Return for every part whether it is off."""
        return {name: name in self.moved for name in _PARTS}

    @property
    def stock(self) -> bool:
        """Whether vLLM runs as if the plugin were not installed."""
        return bool(self.of_kind(Kind.COMMON))

    def family_reason(self, architecture: str) -> str | None:
        """Return why an architecture is left to vLLM, or ``None`` if it is not."""
        moved = [
            seam
            for part, seams in self.of_kind(Kind.FAMILY).items()
            if architecture in part.architectures
            for seam in seams
        ]
        if not moved:
            return None
        return f"vLLM {self.version} {_relation(self.version)}, and has changed {_listed(moved)}"


@lru_cache(maxsize=1)
def current() -> Verdict:
    """Return the verdict on the installed vLLM. The first process of a server finds it and logs it."""
    version = versions.installed()
    if version in versions.TESTED:
        return Verdict(version, version)
    passed = os.environ.get(_VARIABLE)
    if passed is not None:
        verdict = loads(passed)
        if verdict.version == version:
            return verdict
    package = _package()
    verdict = compare(
        lambda seam: fingerprints.find(package, seam.name), version, ignore_code=allows_untested_vllm()
    )
    os.environ[_VARIABLE] = dumps(verdict)
    logger.warning("%s", message(verdict))
    return verdict


def dumps(verdict: Verdict) -> str:
    """Write a verdict as text, for child processes."""
    return json.dumps(asdict(verdict))


def loads(text: str) -> Verdict:
    """Read a verdict from text."""
    fields = json.loads(text)
    for name in ("moved", "ignored"):
        fields[name] = {part: tuple(seams) for part, seams in fields[name].items()}
    return Verdict(**fields)


def compare(
    find: Callable[[Seam], Definition | None],
    version: str,
    *,
    reference: str | None = None,
    ignore_code: bool = False,
) -> Verdict:
    """Compare a vLLM with a tested version.

    Args:
        find: Returns a seam as that vLLM defines it.
        version: Its version.
        reference: The tested version; if left out, the one whose code path it takes.
        ignore_code: Ignore changed code; missing names and parameters cannot be ignored.
    """
    reference = reference or versions.reference(version)
    minor = versions.minor_of(reference)
    moved: dict[str, list[str]] = {}
    ignored: dict[str, list[str]] = {}
    seams = [seam for seam in SEAMS if seam.in_minor(minor)]
    for seam in seams:
        change = _change(seam, find(seam), seam_table.recorded(seam, reference))
        if change is not None:
            target = ignored if ignore_code and change == _CODE else moved
            target.setdefault(seam.part.name, []).append(f"{seam.name} ({change})")
    frozen = ({name: tuple(changes) for name, changes in each.items()} for each in (moved, ignored))
    return Verdict(version, reference, len(seams), *frozen)


def require_pruning(settings: Settings) -> None:
    """Raise ``IncompatibleVllmError`` if the operator's settings prune every image and nothing can be pruned."""
    verdict = current()
    if not (verdict.stock and settings.prunes_by_default):
        return
    changed = _listed([seam for seams in verdict.of_kind(Kind.COMMON).values() for seam in seams])
    raise IncompatibleVllmError(
        "The settings prune images of requests without a budget, but nothing can be pruned with vLLM "
        f"{verdict.version}. It {_relation(verdict.version)}, and has changed {changed}. {next_step(verdict)} To "
        f"start without pruning, set {PREFIX}ENABLED=false."
    )


def _change(seam: Seam, found: Definition | None, tested: Definition | None) -> str | None:
    """Return what changed of a seam, or ``None``."""
    if seam.use == "add":
        return None if found is None else "exists now"
    if found is None:
        return "gone"
    missing = [parameter for parameter in seam.takes if parameter not in found.parameters]
    if missing:
        return f"takes no {', '.join(missing)}"
    if not seam.body or (tested is not None and found.fingerprint(seam.words) == tested.fingerprint(seam.words)):
        return None
    return _CODE


def _package() -> Path:
    import vllm

    return Path(vllm.__file__).parent


def message(verdict: Verdict) -> str:
    """Return what to log about an untested version: what it is, what runs, what moved, what to do."""
    if verdict.tested:
        return f"This release of promprune-vllm was tested with vLLM {verdict.version}."
    moved = sum(len(seams) for seams in (*verdict.moved.values(), *verdict.ignored.values()))
    text = [
        f"vLLM {verdict.version} {_relation(verdict.version)}.",
        f"{verdict.seams - moved} of {verdict.seams} functions and classes that promprune-vllm depends on are as "
        f"in {verdict.reference}.",
    ]
    common, families, features = (verdict.of_kind(kind) for kind in (Kind.COMMON, Kind.FAMILY, Kind.FEATURE))
    if common:
        changed = _listed([seam for seams in common.values() for seam in seams])
        text.append(
            "PromPrune is off, vLLM runs as if it were not installed, and budgets in requests have no effect, "
            f"because of {changed}."
        )
    else:
        text += [
            f"Off: {part.name} ({part.without}), because of {_listed(seams)}."
            for part, seams in (*families.items(), *features.items())
        ]
    if verdict.ignored:
        changed = _listed([seam for seams in verdict.ignored.values() for seam in seams])
        text.append(f"{OVERRIDE} ignores changes of {changed}: pruning may select wrong tokens or fail.")
    if not verdict.moved:
        text.append("Everything runs. What these places call, and torch, were not compared.")
    else:
        text.append(next_step(verdict))
    return " ".join(text)


def next_step(verdict: Verdict) -> str:
    """Return what an operator can do about a part that does not run."""
    step = f"Update promprune-vllm, or install vLLM {versions.TESTED[-1]}"
    can_ignore = all(seam.endswith(f"({_CODE})") for seams in verdict.moved.values() for seam in seams)
    return f"{step}, or set {OVERRIDE} to run it anyway." if can_ignore else f"{step}."


def _relation(version: str) -> str:
    tested = f"was tested with {', '.join(versions.TESTED)}"
    try:
        parsed = Version(version)
    except InvalidVersion:
        return f"has no version number, and this release of promprune-vllm {tested}"
    if parsed > Version(versions.TESTED[-1]):
        return f"is newer than this release of promprune-vllm, which {tested}"
    if parsed < Version(versions.TESTED[0]):
        return f"is older than this release of promprune-vllm supports; it {tested}"
    return f"was not tested with this release of promprune-vllm, which {tested}"


def _listed(seams: list[str] | tuple[str, ...]) -> str:
    shown = list(dict.fromkeys(seams))
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
