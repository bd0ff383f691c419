"""``promprune eval``: its options; everything heavy is imported once they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promprune_vllm.errors import PromPruneError

if TYPE_CHECKING:
    from rich.console import Console

    from promprune_vllm.evaluation.report import Report

BUDGETS = "192,128,64,32,16,8"
_SERVED = "of the server at --url; the first it serves by default. Without --url: the checkpoint to serve."


def evaluate(  # noqa: PLR0917  # options of the command line, given by name
    url: Annotated[
        str | None, typer.Option("--url", help="A running server; without one, the demo's is started.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="Of the server at --url.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help=f"Name {_SERVED}")] = None,
    methods: Annotated[
        str,
        typer.Option("--methods", help="With commas between; name:N asks N questions. Default: all it allows."),
    ] = "",
    budgets: Annotated[
        str, typer.Option("--budgets", help='Tokens or shares such as "25%", with commas between.')
    ] = BUDGETS,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Tasks, or kinds of scenes, with commas between. Default: all.")
    ] = "",
    questions: Annotated[int, typer.Option("--questions", min=1, help="Of each task with each method.")] = 500,
    out: Annotated[Path, typer.Option("--out", help="Folder of the answers; goes on with what is there.")] = Path(
        "eval"
    ),
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=256, help="Requests in flight.")] = 16,
    report_only: Annotated[bool, typer.Option("--report-only", help="Ask nothing: report on --out.")] = False,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw them; needs matplotlib.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, not the table.")] = False,
) -> None:
    """Measure what pruning costs: questions about generated scenes, by method, budget and task, over HTTP.

    Every answer is a line of OUT/answers.jsonl; the same command goes on after an interruption.
    """
    from rich.console import Console

    from promprune_vllm.evaluation import plots as drawing
    from promprune_vllm.evaluation import run
    from promprune_vllm.evaluation.plan import wanted
    from promprune_vllm.evaluation.serving import a_server
    from promprune_vllm.evaluation.target import look

    err = Console(stderr=True)
    try:
        if plots:
            drawing.require()
        if report_only:
            report = run.write(out)
        else:
            asked = wanted(
                tasks, budgets, methods, questions=questions, concurrency=concurrency, check=_check(url)
            )
            checkpoint = Path(model) if model and url is None else None
            with a_server(url, checkpoint, err) as address:
                target = look(address, model if url else None, api_key)
                report = run.evaluate(target, asked.plan(list(target.methods)), out, err)
        _show(report, out, err, plots=plots, as_json=as_json)
    except PromPruneError as error:
        typer.secho(f"promprune: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(code=2) from error
    except KeyboardInterrupt:
        typer.secho(f"promprune: interrupted; the same command goes on with {out}.", err=True)
        raise typer.Exit(code=130) from None


def _check(url: str | None) -> Callable[[str], object]:
    """Return what refuses a method's name: the registry, or nobody before the server at ``--url`` is asked."""
    if url is not None:
        return str
    from promprune_vllm.core.registry import get_method

    return get_method


def _show(report: Report, out: Path, err: Console, *, plots: bool, as_json: bool) -> None:
    from rich.console import Console

    from promprune_vllm.evaluation.plots import save
    from promprune_vllm.evaluation.text import terminal

    if plots:
        save(report, out)
    if as_json:
        typer.echo(json.dumps(report.as_document(), indent=2))
    else:
        Console(width=None if Console().is_terminal else 130).print(terminal(report))
    err.print(
        f"Everything is in {out}: summary.md, summary.json{', the plots' if plots else ''}.", highlight=False
    )
