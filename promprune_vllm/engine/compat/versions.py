"""The vLLM versions that this release was tested with, and how versions compare."""

from __future__ import annotations

import re

TESTED = ("0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
"""vLLM versions this release was tested with, the newest last; at most one of each minor."""

NEXT_STEP = (
    "Install a vLLM that this release was tested with (`pip install 'promprune-vllm[cpu]'` or `[cuda]` picks "
    "one), or start this one without pruning by setting PROMPRUNE_ENABLED=false or uninstalling promprune-vllm."
)


def installed() -> str:
    """Return the version of the installed vLLM, without the suffix of its build, such as ``+cpu``."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def minor_of(version: str) -> str:
    """Return the minor of a version, such as 0.33 of 0.33.1rc1.

    A build from source without a version, such as "dev", counts as newer than all tested ones.
    """
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else minor_of(TESTED[-1])


def installed_minor() -> str:
    """Return the minor of the installed vLLM."""
    return minor_of(installed())


def is_before(minor: str, other: str) -> bool:
    """Whether a minor is older than another."""
    return _numbers(minor) < _numbers(other)


def _numbers(minor: str) -> list[int]:
    return [int(number) for number in minor.split(".")]


def before(minor: str) -> bool:
    """Whether the installed vLLM is older than a minor."""
    return is_before(installed_minor(), minor)


def reference(version: str) -> str:
    """Return the tested version whose code ours is written for when it runs with this one.

    That is the tested version of the same minor, or the newest before it, or the oldest of all.
    """
    minor = minor_of(version)
    older = [tested for tested in TESTED if not is_before(minor, minor_of(tested))]
    return older[-1] if older else TESTED[0]
