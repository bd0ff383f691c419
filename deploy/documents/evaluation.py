"""What `make eval` and `make eval-at-64` have measured: tables between marks of the pages, and plots."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation import text
from promprune_vllm.evaluation.records import FILE, read
from promprune_vllm.evaluation.report import SUBJECT, Report, summarize

AT_64 = "at-64"
"""Folder that `make eval-at-64` writes to, in that of `make eval`."""
PLOTS = ("accuracy-budget.png", "tasks-64.png", "tasks-16.png", "asking-again.png")
README_METHODS = ("promprune", "divprune", "split-0", "random", "uniform")
README_FIRST_TRIES = ("64", "32")
README_SHARE = 0.35
"""Asking again is shown at the highest threshold that spends no more than this share of all tokens."""


def render(folder: Path) -> dict[str, str]:
    """Return the blocks of pages that show a run, by the names of their marks.

    Args:
        folder: ``--out`` of the run.

    Raises:
        EvaluationError: The folder has no answers, or its answers have no confidence.
    """
    report = summarize(read(folder / FILE))
    if not report.curves:
        raise EvaluationError(f"The answers in {folder} have no confidence: run `make eval` into an empty folder.")
    blocks = {name: of(report) for name, of in BLOCKS.items()}
    if (folder / AT_64 / FILE).is_file():
        blocks[AT_64] = _deeper(text.markdown(summarize(read(folder / AT_64 / FILE)))).strip()
    return blocks


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


def _cheap_thresholds(report: Report) -> str:
    sentences = []
    for budget in README_FIRST_TRIES:
        curve = report.curve(SUBJECT, budget)
        if curve is None:
            raise EvaluationError(f"The run has no answers of {SUBJECT} at {budget} tokens.")
        point = [each for each in curve.points if each.share <= README_SHARE][-1]
        sentences.append(f"- {text.what_it_gives(curve, point)}")
    return "\n".join(sentences)


def _again(report: Report) -> str:
    return f"{text.asking_again(report)}\n\n{text.provenance_line(report)}"


def _deeper(markdown: str) -> str:
    return markdown.replace("### ", "#### ")


BLOCKS: Mapping[str, Callable[[Report], str]] = {
    "losses": lambda report: text.lost_table(report, README_METHODS),
    "recommendation": _cheap_thresholds,
    "eval": _tables,
    "asking-again": _again,
    "results": lambda report: text.markdown(report).strip(),
}
