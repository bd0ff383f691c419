"""``promprune eval --lmms``: runs lmms-eval against a server, once for every method and budget.

lmms-eval cannot add request fields, so each run talks to a proxy that adds the method and the budget. lmms-eval
scores a failed request as a wrong answer; here one failed request fails the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from promprune_vllm.bench.provenance import provenance
from promprune_vllm.demo.processes import supervised
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.cells import named
from promprune_vllm.evaluation.proxy import Tally, proxy
from promprune_vllm.evaluation.published import BENCHMARKS, PUBLISHED, REPORTED
from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.sender import Way
from promprune_vllm.evaluation.target import Target
from promprune_vllm.markdown import table as markdown_table

NOT_MEASURED = "*not measured here*"
_BENCHMARK_BY_TASK = {benchmark.task: benchmark for benchmark in BENCHMARKS}
_LOG_LINES = 15


@dataclass(frozen=True, slots=True)
class Run:
    """How to run lmms-eval.

    Args:
        command: The program and its first arguments.
        tasks: lmms-eval tasks.
        words: Extra arguments, passed through unchanged.
        out: Folder for results and logs.
        concurrency: Requests in flight.
    """

    command: tuple[str, ...]
    tasks: tuple[str, ...]
    words: tuple[str, ...]
    out: Path
    concurrency: int


@dataclass(frozen=True, slots=True)
class Row:
    """Scores of one run.

    Args:
        method: Method, or ``full`` if every token was kept.
        budget: Budget of the requests.
        requests: Answered requests.
        kept_share: Visual tokens that entered the language model, as a share of those before pruning.
        scores: Scores by task, as the papers print them.
    """

    method: str
    budget: str
    requests: int
    kept_share: float
    scores: Mapping[str, float]


def drive(target: Target, ways: Sequence[Way], run: Run, err: Console) -> dict[str, Any]:
    """Run lmms-eval once for every way, and return the scores.

    Args:
        target: The server.
        ways: Methods with budgets, ``full`` first.
        run: How to run lmms-eval.
        err: Console that shows the progress.

    Raises:
        EvaluationError: lmms-eval is not installed or failed, or the server refused one of its requests.
    """
    target.require([way.method for way in ways if way.method != FULL_METHOD])
    rows = []
    for way in ways:
        err.print(f"lmms-eval with {way.fields}: {', '.join(run.tasks)} …", highlight=False)
        rows.append(_row(target, way, run))
    document = {
        "settings": target.settings(),
        "rows": [asdict(row) for row in rows],
        "run": provenance(),
    }
    (run.out / "lmms.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (run.out / "lmms.md").write_text(table(rows, run.tasks) + "\n", encoding="utf-8")
    return document


def table(rows: Sequence[Row], tasks: Sequence[str] = tuple(_BENCHMARK_BY_TASK)) -> str:
    """Return a Markdown table in the papers' layout: rows measured here, then rows from the papers.

    Args:
        rows: Measured rows, ``full`` first; if there are none, placeholder rows say so.
        tasks: lmms-eval tasks, one per column.
    """
    titles = [_BENCHMARK_BY_TASK[task].title if task in _BENCHMARK_BY_TASK else task for task in tasks]
    head = ["", "tokens", *titles, "relative, %", "whose figures"]
    lines: list[list[str]] = []
    full = next((row for row in rows if row.method == FULL_METHOD), None)
    for row in rows:
        cells = [_number(row.scores.get(task)) for task in tasks]
        lines.append([named(row.method), row.budget, *cells, _relative(row, full, tasks), "measured here"])
    if not rows:
        for method, budget in (("all tokens", "576"), ("`promprune`", "64")):
            lines.append([method, budget, *[NOT_MEASURED] * (len(tasks) + 1), "ours"])
    for reported in REPORTED:
        cells = [_number(reported.scores.get(task)) for task in tasks]
        lines.append(
            [
                reported.method,
                str(reported.tokens),
                *cells,
                f"{reported.relative:.1f}",
                f"the paper's, {reported.source}",
            ]
        )
    return markdown_table(head, lines)


def published_table() -> str:
    """Return the papers' newest means by model and method, as a percentage of all tokens, in Markdown."""
    rows = []
    for each in PUBLISHED:
        for method, means in each.means.items():
            figures = (
                f"{budget}: {'-' if mean is None else f'{100 * mean / each.full:.1f}'}"
                for budget, mean in zip(each.budgets, means, strict=True)
            )
            rows.append([each.model, method, "; ".join(figures), each.benchmarks, each.source])
    return markdown_table(["model", "method", "tokens kept: % of all tokens' mean", "mean over", "source"], rows)


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a document."""
    return [Row(**row) for row in document["rows"]]


def _row(target: Target, way: Way, run: Run) -> Row:
    folder = run.out / f"{way.method}-{way.budget_text.strip('%')}"
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*_results.json"))
    with proxy(target, way.fields) as (address, key, tally):
        _run(_words(target, run, address, folder), key, folder / "log.txt")
    if tally.refused or not tally.answered:
        what = tally.last_refusal or "it sent no request"
        raise EvaluationError(
            f"{tally.refused} requests of lmms-eval with {way.fields} failed at {target.url}, and it would score "
            f"them as wrong answers ({what}): see {folder / 'log.txt'}."
        )
    new_files = sorted(set(folder.rglob("*_results.json")) - before)
    if not new_files:
        raise EvaluationError(f"lmms-eval wrote no results below {folder}: see log.txt there.")
    results = json.loads(new_files[-1].read_text(encoding="utf-8"))["results"]
    return Row(way.method, way.budget_text, tally.answered, _share(tally), scores(results))


def _words(target: Target, run: Run, address: str, folder: Path) -> list[str]:
    arguments = f"model_version={target.model},base_url={address}/v1,num_concurrent={run.concurrency}"
    options = ["--model", "openai", "--model_args", arguments, "--tasks", ",".join(run.tasks)]
    return [*run.command, *options, "--batch_size", "1", "--output_path", str(folder), *run.words]


def _run(words: Sequence[str], key: str, log: Path) -> None:
    if shutil.which(words[0]) is None:
        raise EvaluationError(
            f"lmms-eval cannot be run: there is no program {words[0]}. Install it in a separate environment with "
            "`pip install lmms-eval`, and set --lmms-command to the command that runs it."
        )
    environment = {**os.environ, "OPENAI_API_KEY": key}
    with (
        log.open("wb") as output,
        supervised(words, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        status = process.wait()
    if status:
        end = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:])
        raise EvaluationError(f"lmms-eval exited with status {status}; the end of {log}:\n{end}")


def scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return one score per task from lmms-eval's results: the one that the papers print, or the first metric."""
    score_by_task = {}
    for task, metrics in results.items():
        values = {
            name.partition(",")[0]: float(value)
            for name, value in metrics.items()
            if "," in name and "_stderr" not in name and isinstance(value, int | float)
        }
        benchmark = _BENCHMARK_BY_TASK.get(task)
        if benchmark is not None and set(benchmark.metrics) <= set(values):
            score_by_task[task] = round(benchmark.scale * sum(values[name] for name in benchmark.metrics), 4)
        elif values:
            score_by_task[task] = next(iter(values.values()))
    return score_by_task


def _share(tally: Tally) -> float:
    return round(tally.kept / tally.seen, 4) if tally.seen else 1.0


def _relative(row: Row, full: Row | None, tasks: Sequence[str]) -> str:
    both = [task for task in tasks if full is not None and full.scores.get(task) and task in row.scores]
    if full is None or not both:
        return "-"
    return f"{100 * sum(row.scores[task] / full.scores[task] for task in both) / len(both):.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}"
