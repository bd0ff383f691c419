"""Compares two runs of vLLM's tests: the part of vllm_tests.py that runs nothing."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

REASONS = Path(__file__).with_name("vllm_tests.toml")


@dataclass(frozen=True)
class Reason:
    """Why tests differ: a pattern for their names, with * for anything, and a sentence."""

    tests: str
    reason: str

    def covers(self, test: str) -> bool:
        # fnmatch would treat the brackets of parameters as a character set.
        return fnmatchcase(test, self.tests.replace("[", "[[]"))


@dataclass(frozen=True)
class Difference:
    test: str
    without: str
    with_plugin: str
    failure: str
    reason: str | None


Outcomes = Mapping[str, tuple[str, str]]
"""Test -> its outcome, and its failure text."""


def compare(without: Outcomes, with_plugin: Outcomes, reasons: Iterable[Reason]) -> dict[str, Any]:
    """Compare two runs of the same tests; the result is what --json prints."""
    names = sorted(without.keys() | with_plugin.keys())
    entries, none = list(reasons), ("did not run", "")
    differences = []
    for name in names:
        before, (after, failure) = without.get(name, none)[0], with_plugin.get(name, none)
        if before != after:
            reason = next((each.reason for each in entries if each.covers(name)), None)
            differences.append(Difference(name, before, after, failure, reason))
    different = {each.test for each in differences}
    judged = [each for each in entries if any(each.covers(name) for name in names)]
    return {
        "ran_both_ways": len(without.keys() & with_plugin.keys()),
        "equal": len(names) - len(different),
        "equal_by_outcome": dict(Counter(without[name][0] for name in names if name not in different)),
        "differing": len(different),
        "differences": [vars(each) for each in differences],
        "stale_reasons": [each.tests for each in judged if not any(each.covers(name) for name in different)],
    }


def passes(result: Mapping[str, Any]) -> bool:
    """Return whether every difference has a reason, and every reason a difference."""
    return not result["stale_reasons"] and all(each["reason"] for each in result["differences"])


def text(result: Mapping[str, Any]) -> str:
    """Return the result as text."""
    equal = ", ".join(f"{count} {outcome}" for outcome, count in sorted(result["equal_by_outcome"].items()))
    lines = [
        f"{result['ran_both_ways']} tests of vLLM {result['vllm']} ran with and without the plugin.",
        f"equal: {result['equal']} ({equal}); tests that fail in both runs prove nothing",
        f"differing: {result['differing']}",
    ]
    for each in result["differences"]:
        lines.append(f"  {each['test']}: {each['without']} without, {each['with_plugin']} with")
        lines.append(f"    {each['reason'] or 'NO REASON: ' + (each['failure'].splitlines() or ['?'])[-1]}")
    lines += [f"no longer differs, remove it from {REASONS.name}: {tests}" for tests in result["stale_reasons"]]
    return "\n".join(lines)


def read_reasons(file: Path) -> list[Reason]:
    """Read the list of known differences."""
    return [Reason(**each) for each in tomllib.loads(file.read_text()).get("difference", [])]
