"""``promprune eval``: asks the questions that have no answer yet, stores the answers, and computes the report."""

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
from promprune_vllm.core.escalation import WINDOW
from promprune_vllm.evaluation.plan import Plan
from promprune_vllm.evaluation.records import FILE, FULL_METHOD, Answer, Log, read
from promprune_vllm.evaluation.report import Report, summarize
from promprune_vllm.evaluation.sender import ANSWER_TOKENS, ask_all, jobs
from promprune_vllm.evaluation.smaller import on_the_client
from promprune_vllm.evaluation.target import Target
from promprune_vllm.evaluation.tasks import SPLIT, Draw, Picture, fingerprint, gather, scenes
from promprune_vllm.evaluation.text import markdown

_SECONDS_BETWEEN_LINES = 30


def evaluate(target: Target, plan: Plan, out: Path, err: Console, draw: Draw | None = None) -> Report:
    """Ask the questions that the folder has no answers to yet, and report on all of its answers.

    Args:
        target: Server to ask.
        plan: Questions to ask.
        out: Folder of the answers; an earlier run there is resumed.
        err: Console that shows the progress.
        draw: Draws a scene; the demo's generator by default.

    Raises:
        EvaluationError: The server does not allow a method, or the folder's answers have other settings.
    """
    pictures = gather(plan.tasks, plan.questions, draw)
    first = (draw or scenes())(pictures[0].kind, pictures[0].seed, SPLIT)
    ways, notes = on_the_client(target, plan.ways, first.image().size)
    on_the_server = (way.method for way in ways if way.method != FULL_METHOD and way.smaller is None)
    target.require(tuple(dict.fromkeys(on_the_server)))
    settings = target.settings() | {
        "scenes": {"split": SPLIT, "fingerprint": fingerprint(draw)},
        "answer_tokens": ANSWER_TOKENS,
        "confidence_tokens": WINDOW,  # absent from folders whose answers have no confidence
        **({"temperature": plan.temperature} if plan.temperature else {}),
    }
    with Log(out / FILE, settings, provenance()) as log:
        todo = list(jobs(pictures, ways, log.answers))
        total = sum(1 for _ in jobs(pictures, ways))
        for line in (*notes, _describe(total, len(todo), pictures, out / FILE)):
            err.print(line, highlight=False, markup=False)
        if todo:
            with progress(err, len(todo)) as advance:

                def keep(answer: Answer) -> None:
                    log.add(answer)
                    advance()

                ask_all(target, iter(todo), plan.concurrency, keep, draw, temperature=plan.temperature)
    return write(out)


def write(out: Path) -> Report:
    """Compute the report on a folder's answers and write it next to them, as JSON and as Markdown.

    Args:
        out: Folder with a file of answers.
    """
    report = summarize(read(out / FILE))
    (out / "summary.json").write_text(json.dumps(report.as_document(), indent=2) + "\n", encoding="utf-8")
    (out / "summary.md").write_text(markdown(report), encoding="utf-8")
    return report


def _describe(total: int, missing: int, pictures: Sequence[Picture], file: Path) -> str:
    earlier = f", {total - missing} of them answered before" if missing < total else ""
    return f"{total} questions about {len(pictures)} images{earlier}; answers go to {file}"


@contextmanager
def progress(err: Console, total: int, doing: str = "asking") -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal, or a line from time to time in a log.

    Args:
        err: Console that shows it.
        total: Number of answers to come; call what is yielded after each.
        doing: Word before the bar.
    """
    if err.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn(doing), *columns, console=err) as bar:
            task = bar.add_task(doing, total=total)
            yield lambda: bar.advance(task)
        return
    started = last_line = time.monotonic()
    done = 0

    def line() -> None:
        nonlocal done, last_line
        done += 1
        now = time.monotonic()
        if done == total or now - last_line >= _SECONDS_BETWEEN_LINES:
            last_line = now
            rate = done / max(now - started, 1e-9)
            left = f", {(total - done) / rate / 60:.0f} min left" if done < total else ""
            err.print(f"{done} of {total} answers, {rate:.1f} per second{left}", highlight=False)

    yield line
