"""``promprune serve``."""

from __future__ import annotations

import typer

from promprune_vllm.commands import vllm_cli
from promprune_vllm.commands.failures import failing


def serve(context: typer.Context) -> None:
    """Serve MODEL with vLLM and pruning. Accepts every `vllm serve` option and our --visual-token-... ones."""
    from promprune_vllm.commands import serve_options
    from promprune_vllm.config import Settings

    if {"-h", "--help"} & set(context.args):
        typer.echo(serve_options.help_text())
    arguments, dry_run = serve_options.take(context.args)
    with failing():
        settings = Settings.from_environment()
        if dry_run:
            typer.echo(settings.model_dump_json(indent=2))
        else:
            vllm_cli.run(["serve", *arguments])
