"""The table ``seams.json``: every seam's parameters and the fingerprint of its code, in every tested version.

`make seams` writes it from vLLM's wheels. A seam has an entry only for versions that changed it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Protocol

from packaging.version import Version

from promprune_vllm.engine.compat.seam import Seam

NAME = "seams.json"
Table = Mapping[str, Mapping[str, list[str] | None]]
"""Key of a seam -> first version that has it so -> fingerprint and parameters, or ``None`` if it has none."""


class Definition(Protocol):
    """A seam as some vLLM defines it: read from its files, or from the table."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its parameters, or of a class's fields."""

    def fingerprint(self, words: Collection[str] = ()) -> str:
        """Hash the code, or only the statements that use any of these names."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A seam of a tested version."""

    code: str
    parameters: tuple[str, ...]

    def fingerprint(self, words: Collection[str] = ()) -> str:  # noqa: ARG002  the words are part of the key
        """Return the fingerprint in the table."""
        return self.code


@lru_cache(maxsize=1)
def table() -> Table:
    """Read the table."""
    content: Table = json.loads(files("promprune_vllm.engine.compat").joinpath(NAME).read_text())
    return content


def recorded(seam: Seam, version: str) -> Recorded | None:
    """Return a seam as a tested version has it, or ``None`` if that has no such seam."""
    entries = table().get(seam.key, {})
    older = [each for each in entries if Version(each) <= Version(version)]
    entry = entries[max(older, key=Version)] if older else None
    return None if entry is None else Recorded(entry[0], tuple(entry[1:]))
