"""``promprune eval``: asks what is still to be asked, keeps every answer, and works out the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from promprune_vllm.bench.provenance import provenance
from promprune_vllm.evaluation.asking import ANSWER_TOKENS, ask_all, jobs
from promprune_vllm.evaluation.plan import Plan
from promprune_vllm.evaluation.records import FILE, Answer, Log, read
from promprune_vllm.evaluation.report import Report, summarise
from promprune_vllm.evaluation.target import Target
from promprune_vllm.evaluation.tasks import SPLIT, Draw, Picture, fingerprint, gather
from promprune_vllm.evaluation.text import markdown

_SECONDS_BETWEEN_LINES = 30


def evaluate(target: Target, plan: Plan, out: Path, err: Console, draw: Draw | None = None) -> Report:
    """Ask what the folder has no answers to yet, and return what all of its answers say.

    Args:
        target: Whom to ask.
        plan: What.
        out: Folder of the answers; an earlier run's is gone on with.
        err: Shows the progress.
        draw: Makes a scene; that of the demo by default.

    Raises:
        EvaluationError: The server cannot be asked this, or the folder's answers are of other settings.
    """
    target.require(plan.methods)
    settings = target.settings() | {
        "scenes": {"split": SPLIT, "fingerprint": fingerprint(draw)},
        "answer_tokens": ANSWER_TOKENS,
    }
    pictures = gather(plan.tasks, plan.questions, draw)
    with Log(out / FILE, settings, provenance()) as log:
        todo = list(jobs(pictures, plan.ways, log.answers))
        asked = sum(1 for _ in jobs(pictures, plan.ways))
        err.print(_told(asked, len(todo), pictures, out / FILE), highlight=False)
        if todo:
            with _progress(err, len(todo)) as advance:

                def keep(answer: Answer) -> None:
                    log.add(answer)
                    advance()

                ask_all(target, iter(todo), plan.concurrency, keep, draw)
    return write(out)


def write(out: Path) -> Report:
    """Work out the report of a folder's answers and write it beside them, as JSON and as Markdown.

    Args:
        out: Folder with a file of answers.
    """
    report = summarise(read(out / FILE))
    (out / "summary.json").write_text(json.dumps(report.as_document(), indent=2) + "\n", encoding="utf-8")
    (out / "summary.md").write_text(markdown(report), encoding="utf-8")
    return report


def _told(asked: int, missing: int, pictures: Sequence[Picture], file: Path) -> str:
    there = f", {asked - missing} of them answered before" if missing < asked else ""
    return f"{asked} questions about {len(pictures)} images{there}; answers go to {file}"


@contextmanager
def _progress(err: Console, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal, and a line now and then in a log."""
    if err.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("asking"), *columns, console=err) as bar:
            task = bar.add_task("asking", total=total)
            yield lambda: bar.advance(task)
        return
    started = told = time.monotonic()
    done = 0

    def line() -> None:
        nonlocal done, told
        done += 1
        now = time.monotonic()
        if done == total or now - told >= _SECONDS_BETWEEN_LINES:
            told = now
            rate = done / max(now - started, 1e-9)
            left = f", {(total - done) / rate / 60:.0f} min left" if done < total else ""
            err.print(f"{done} of {total} answers, {rate:.1f} per second{left}", highlight=False)

    yield line
