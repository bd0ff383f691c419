"""What a run has measured so far, in two files that are complete at any moment: ``gpu.json`` and ``gpu.md``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from promprune_vllm.bench.gpu import text
from promprune_vllm.errors import BenchError

JSON, MARKDOWN = "gpu.json", "gpu.md"
State = Literal["waiting", "running", "done", "failed", "cut off", "skipped"]


class Report:
    """The document of a run, written into a folder whenever it changes.

    Args:
        folder: Created if it is missing.
        head: Shape, device, time limit, provenance.
        stages: Names of the stages, in order.

    Raises:
        BenchError: The folder already has a report, which is not replaced.
    """

    def __init__(self, folder: Path, head: dict[str, Any], stages: Sequence[str]) -> None:
        if (folder / JSON).exists():
            raise BenchError(f"{folder} already has a report, {JSON}. Name a new folder with --out.")
        self.folder = folder
        self.stages: dict[str, dict[str, Any]] = {name: {"name": name, "state": "waiting"} for name in stages}
        self.document = {"kind": "gpu", **head, "ended": False, "stages": list(self.stages.values())}
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def put(self, stage: str, state: State, **fields: object) -> None:
        """Set the state and other fields of a stage, and write both files."""
        self.stages[stage].update(state=state, **fields)
        self.write()

    def end(self, seconds: float) -> None:
        """Note that the run came to its end, and write both files."""
        self.document.update(ended=True, seconds=round(seconds, 1))
        self.write()

    def names(self, *states: State) -> list[str]:
        """Return the stages in any of the states."""
        return [name for name, stage in self.stages.items() if stage["state"] in states]

    def write(self) -> None:
        """Write both files. Each is renamed into place, so whoever reads it, at any time, reads all of it."""
        replace(self.folder / JSON, json.dumps(self.document, indent=2) + "\n")
        replace(self.folder / MARKDOWN, text.markdown(self.document))


def replace(file: Path, contents: str) -> None:
    """Write a file beside another one, and rename it over that one."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(contents, encoding="utf-8")
    os.replace(fresh, file)


def read(folder: Path) -> dict[str, Any]:
    """Return the document in a folder.

    Raises:
        BenchError: There is none.
    """
    try:
        document = json.loads((folder / JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{folder} has no report of `promprune bench gpu`: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != "gpu":
        raise BenchError(f"{folder / JSON} is not a report of `promprune bench gpu`.")
    return document
