"""What `make eval` and `make eval-at-64` have measured: tables between marks of the pages, and plots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation import clips, text
from promprune_vllm.evaluation.records import FILE, read
from promprune_vllm.evaluation.report import SUBJECT, Report, summarize

AT_64 = "at-64"
"""Folder that `make eval-at-64` writes to, in that of `make eval`."""
PLOTS = ("accuracy-budget.png", "tasks-64.png", "tasks-16.png", "asking-again.png", "clips.png")
README_METHODS = ("promprune", "divprune", "split-0", "random", "uniform", "downsample")


def render(folder: Path, only: Sequence[str] = ()) -> dict[str, str]:
    """Return the blocks of pages that show a run, by the names of their marks.

    Args:
        folder: ``--out`` of the run.
        only: Names of the blocks; all by default.

    Raises:
        EvaluationError: The folder has no answers, its answers have no confidence, or a block does not exist.
    """
    if unknown := {*only} - {*BLOCKS}:
        raise EvaluationError(f"There is no block {', '.join(sorted(unknown))}. Blocks: {', '.join(BLOCKS)}.")
    report = summarize(read(folder / FILE))
    if not report.curves:
        raise EvaluationError(f"The answers in {folder} have no confidence: run `make eval` into an empty folder.")
    blocks = {name: of(report) for name, of in BLOCKS.items() if name in (only or BLOCKS)}
    if not only and (folder / AT_64 / FILE).is_file():
        blocks[AT_64] = _deeper(text.markdown(summarize(read(folder / AT_64 / FILE)))).strip()
    return blocks


def render_clips(folder: Path) -> dict[str, str]:
    """Return the blocks of pages that show ``--clips N --out folder``."""
    document = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    return {name: render(document) for name, render in CLIP_BLOCKS.items()}


def copy_plots(folder: Path, images: Path) -> list[Path]:
    """Copy the plots that pages show, those that the run has drawn; return the copies."""
    return [Path(shutil.copy(folder / name, images)) for name in PLOTS if (folder / name).is_file()]


def _tables(report: Report) -> str:
    parts = [
        "**Lost to all tokens, on the same questions, points**",
        text.lost_table(report),
        f"**`{SUBJECT}` minus the others, points**",
        text.pairs_table(report),
        text.NOTE,
        text.provenance_line(report),
    ]
    return "\n\n".join(parts)


def _again(report: Report) -> str:
    return f"{text.asking_again(report)}\n\n{text.provenance_line(report)}"


def _checks(report: Report) -> str:
    macro = f"**Macro accuracy, %**\n\n{text.macro_table(report)}"
    return "\n\n".join([macro, text.checks(report), text.provenance_line(report)])


def _deeper(markdown: str) -> str:
    return markdown.replace("### ", "#### ")


BLOCKS: Mapping[str, Callable[[Report], str]] = {
    "losses": lambda report: text.lost_table(report, README_METHODS),
    "eval": _tables,
    "asking-again": _again,
    "checks": _checks,
    "results": lambda report: text.markdown(report, checked=False).strip(),
}
CLIP_BLOCKS: Mapping[str, Callable[[clips.Document], str]] = {
    "clips": lambda document: clips.markdown(document).strip(),
    "clips-half": clips.half_table,
}
"""Blocks that show what happened to clips."""
