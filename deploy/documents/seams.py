"""Renders for the documentation what the plugin depends on in vLLM, and which minors changed it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from promprune_vllm.engine.compat import seam_table, verdict, versions
from promprune_vllm.engine.compat.parts import Part
from promprune_vllm.engine.compat.seam import Seam
from promprune_vllm.engine.compat.seams import SEAMS
from promprune_vllm.markdown import table


def markdown() -> str:
    """Render every part: its seams, the minors that would have turned it off, and what is different without it."""
    columns = ("part", "code compared", "signatures compared", "changed in", "without it")
    return table(columns, (_row(part, seams) for part, seams in _by_part().items()))


def _by_part() -> dict[Part, list[Seam]]:
    newest = versions.minor_of(versions.TESTED[-1])
    grouped: dict[Part, list[Seam]] = {}
    for seam in SEAMS:
        if seam.in_minor(newest):
            grouped.setdefault(seam.part, []).append(seam)
    return grouped


def _row(part: Part, seams: Sequence[Seam]) -> tuple[str, ...]:
    code = sum(seam.body for seam in seams)
    minors = ", ".join(versions.minor_of(version) for version in _changed(part)) or "-"
    without = part.without or "nothing is pruned: vLLM runs as if the plugin were not installed"
    return part.name, str(code), str(len(seams) - code), minors, without


def _changed(part: Part) -> list[str]:
    """Return the tested versions that a release written for the one before would not have run the part on."""
    steps = zip(versions.TESTED, versions.TESTED[1:], strict=False)
    return [new for old, new in steps if _step(old, new).is_off(part)]


@cache
def _step(old: str, new: str) -> verdict.Verdict:
    return verdict.compare(lambda seam: seam_table.recorded(seam, new), new, reference=old)
