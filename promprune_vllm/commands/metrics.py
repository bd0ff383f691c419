"""``promprune metrics``."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def metrics(
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
