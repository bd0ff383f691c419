"""The ``promprune`` command line: registers the commands of ``promprune_vllm.commands``."""

from __future__ import annotations

from typing import Annotated

import typer

from promprune_vllm.commands.bench import bench
from promprune_vllm.commands.calibrate import calibrate
from promprune_vllm.commands.demo import demo
from promprune_vllm.commands.demo_model import demo_model
from promprune_vllm.commands.eval import evaluate
from promprune_vllm.commands.families import families
from promprune_vllm.commands.methods import methods
from promprune_vllm.commands.metrics import metrics
from promprune_vllm.commands.plan import plan
from promprune_vllm.commands.select import select
from promprune_vllm.commands.serve import serve
from promprune_vllm.commands.tune import tune
from promprune_vllm.commands.vllm_cli import AS_VLLM, vllm
from promprune_vllm.demo.processes import end_on_signals

app = typer.Typer(
    name="promprune",
    help="Keep only the K most useful visual tokens of each image and video in vLLM, with K set per request.",
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


# --help lists the commands in this order.
app.command("serve", context_settings=AS_VLLM, add_help_option=False)(serve)
app.command("vllm", context_settings=AS_VLLM, add_help_option=False)(vllm)
app.command("methods")(methods)
app.command("families")(families)
app.command("metrics")(metrics)
app.command("calibrate", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(calibrate)
app.command("demo")(demo)
app.command("select")(select)
app.command("plan")(plan)
app.command("tune")(tune)
app.command("eval")(evaluate)
app.add_typer(bench)
app.command("demo-model")(demo_model)
