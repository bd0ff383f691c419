"""``promprune families``."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def families(
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
