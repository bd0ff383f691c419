"""``promprune methods``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from promprune_vllm.commands.failures import fail


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
) -> None:
    """List the methods that can select tokens, with what they need and their defaults."""
    from promprune_vllm.methods_table import describe, markdown

    if as_markdown:
        try:
            typer.echo(markdown())
        except FileNotFoundError as error:
            fail(f"--markdown needs a checkout of the repository: {error}")
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
