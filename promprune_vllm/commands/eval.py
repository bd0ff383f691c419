"""``promprune eval``: the options. Heavy modules are imported only when the command runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promprune_vllm.commands.failures import failing, resumable

if TYPE_CHECKING:
    from rich.console import Console

    from promprune_vllm.evaluation.plan import Options
    from promprune_vllm.evaluation.report import Report

BUDGETS = "192,128,64,32,16,8"
_URL = Annotated[
    str | None,
    typer.Option("--url", help="A running server, such as http://host:8000. Default: start one for the run."),
]
_KEY = Annotated[
    str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="API key of the server at --url, if any.")
]
_MODEL = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="With --url: model name (default: the server's first). Without: checkpoint to serve (default: the "
        "demo model).",
    ),
]
_METHODS = Annotated[
    str,
    typer.Option(
        "--methods",
        help="Comma-separated; name:N asks N questions per task, * is all others for images (default: all).",
    ),
]
_BUDGETS = Annotated[str, typer.Option("--budgets", help='Tokens, or shares such as "25%", comma-separated.')]
_TASKS = Annotated[
    str,
    typer.Option(
        "--tasks",
        help="Tasks or kinds of scenes, comma-separated; name:N caps one at N questions (default: all).",
    ),
]
_QUESTIONS = Annotated[int, typer.Option("--questions", min=1, help="Questions per task and method.")]
_OUT = Annotated[Path, typer.Option("--out", help="Folder for answers and reports; resumes what is there.")]
_FLIGHT = Annotated[int, typer.Option("--concurrency", min=1, max=256, help="Requests in flight.")]
_TEMPERATURE = Annotated[
    float,
    typer.Option("--temperature", min=0, max=2, help="Sampling temperature, with one seed per question."),
]
_REPORT = Annotated[bool, typer.Option("--report-only", help="Ask nothing; report on the answers in --out.")]
_PLOTS = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots; needs matplotlib.")]
_LMMS = Annotated[
    str, typer.Option("--lmms", help="Run these lmms-eval tasks, such as pope,mme,gqa, instead of ours.")
]
_COMMAND = Annotated[
    str, typer.Option("--lmms-command", help="Command that runs lmms-eval, from its own environment.")
]
_WORDS = Annotated[str, typer.Option("--lmms-args", help='Extra arguments for lmms-eval, such as "--limit 200".')]
_CLIPS = Annotated[
    int,
    typer.Option(
        "--clips",
        min=0,
        help="Ask nothing: draw N clips of each kind, and measure which methods keep what happens in them. "
        "Takes --methods, --budgets and --out; needs no server.",
    ),
]
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")]


@dataclass(frozen=True, slots=True)
class _Where:
    url: str | None
    model: str | None
    api_key: str | None
    out: Path


def evaluate(
    *,
    url: _URL = None,
    api_key: _KEY = None,
    model: _MODEL = None,
    methods: _METHODS = "",
    budgets: _BUDGETS = BUDGETS,
    tasks: _TASKS = "",
    questions: _QUESTIONS = 500,
    out: _OUT = Path("eval"),
    concurrency: _FLIGHT = 16,
    temperature: _TEMPERATURE = 0,
    report_only: _REPORT = False,
    plots: _PLOTS = True,
    lmms: _LMMS = "",
    lmms_command: _COMMAND = "lmms-eval",
    lmms_args: _WORDS = "",
    clips: _CLIPS = 0,
    as_json: _JSON = False,
) -> None:
    """Measure what pruning costs: questions about generated scenes, by method, budget and task, over HTTP.

    Each answer is a line of OUT/answers.jsonl; after an interruption, the same command resumes. With --lmms,
    lmms-eval runs the papers' benchmarks instead. With --clips, events of generated videos are counted.
    """
    from rich.console import Console

    from promprune_vllm.evaluation.plan import parse_options

    err, where = Console(stderr=True), _Where(url, model, api_key, out)
    if clips:
        with failing():
            _watch(clips, methods, budgets, out, err, plots=plots, as_json=as_json)
        return
    with resumable(out), failing():
        numbers = {"questions": questions, "concurrency": concurrency}
        options = parse_options(tasks, budgets, methods, **numbers, check=_check(url))
        options = replace(options, temperature=temperature)
        if lmms:
            _drive_lmms(where, options, lmms, lmms_command, lmms_args, err=err, as_json=as_json)
            return
        _require_plots(plots)
        _show(_report(where, None if report_only else options, err), out, err, plots=plots, as_json=as_json)


def _require_plots(wanted: bool) -> None:
    from promprune_vllm.evaluation.plots import require

    if wanted:
        require()


def _watch(clips: int, methods: str, budgets: str, out: Path, err: Console, *, plots: bool, as_json: bool) -> None:
    from rich.progress import Progress

    from promprune_vllm.bench.clips import measure
    from promprune_vllm.core.budget import Budget, from_text
    from promprune_vllm.demo.scenes.clips import CLIP_KINDS
    from promprune_vllm.evaluation import clips as measured
    from promprune_vllm.evaluation.plan import split_list

    _require_plots(plots)
    names = split_list(methods or measured.METHODS)
    shares = split_list(measured.BUDGETS if budgets == BUDGETS else budgets)
    asked = [budget for share in shares if (budget := Budget.parse(from_text(share), "--budgets")) is not None]
    with Progress(console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("watching", total=clips * len(CLIP_KINDS))
        document = measure(clips, names, asked, lambda: bar.advance(task))
    out.mkdir(parents=True, exist_ok=True)
    (out / "clips.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (out / "clips.md").write_text(measured.markdown(document), encoding="utf-8")
    if plots:
        measured.save_plot(document, out)
    _print(document, measured.terminal(document), as_json=as_json)
    err.print(f"Results are in {out}: clips.md, clips.json{', a plot' if plots else ''}.", highlight=False)


def _print(document: object, table: object, *, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        Console(width=None if Console().is_terminal else 130).print(table)


def _check(url: str | None) -> Callable[[str], object]:
    """Return what validates method names: the registry; with ``--url``, nothing, as the server's methods count."""
    if url is not None:
        return str
    from promprune_vllm.core.registry import get_method

    return get_method


def _report(where: _Where, options: Options | None, err: Console) -> Report:
    from promprune_vllm.evaluation import run
    from promprune_vllm.evaluation.server import a_server
    from promprune_vllm.evaluation.target import find_target

    if options is None:
        return run.write(where.out)
    checkpoint = Path(where.model) if where.model and where.url is None else None
    with a_server(where.url, checkpoint, err) as address:
        target = find_target(address, where.model if where.url else None, where.api_key)
        return run.evaluate(target, options.plan(target.image_methods), where.out, err)


def _drive_lmms(
    where: _Where, options: Options, tasks: str, command: str, words: str, *, err: Console, as_json: bool
) -> None:
    from promprune_vllm.errors import EvaluationError
    from promprune_vllm.evaluation import lmms
    from promprune_vllm.evaluation.plan import split_list
    from promprune_vllm.evaluation.target import find_target

    if where.url is None:
        raise EvaluationError("--lmms needs a running server: give its address with --url.")
    target = find_target(where.url, where.model, where.api_key)
    names = tuple(split_list(tasks))
    run = lmms.Run(tuple(shlex.split(command)), names, tuple(shlex.split(words)), where.out, options.concurrency)
    document = lmms.drive(target, options.plan(target.image_methods).ways, run, err)
    typer.echo(json.dumps(document, indent=2) if as_json else lmms.table(lmms.rows_of(document), names))


def _show(report: Report, out: Path, err: Console, *, plots: bool, as_json: bool) -> None:
    from rich.console import Console

    from promprune_vllm.evaluation.plots import save
    from promprune_vllm.evaluation.text import terminal, terminal_asking_again

    if plots:
        save(report, out)
    if as_json:
        typer.echo(json.dumps(report.as_document(), indent=2))
    else:
        console = Console(width=None if Console().is_terminal else 130)
        console.print(terminal(report))
        if report.curves:
            console.print(terminal_asking_again(report))
    err.print(f"Results are in {out}: summary.md, summary.json{', plots' if plots else ''}.", highlight=False)
