"""``promprune methods``."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promprune_vllm.commands.checkout import import_from_checkout

if TYPE_CHECKING:
    from promprune_vllm.core.registry import Selector

PRUNES = {False: "images, frames", True: "videos"}
"""What a method prunes, by whether it compares the frames of a video."""


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/methods.md.")] = False,
) -> None:
    """List the methods that can select tokens, with what they need and their defaults."""
    if as_markdown:
        table = import_from_checkout("deploy.documents.methods", "methods --markdown")
        typer.echo(table.markdown(describe()))
    elif as_json:
        typer.echo(json.dumps(describe(), indent=2))
    else:
        _show(describe())


def describe() -> list[dict[str, Any]]:
    """Describe every method as plain data.

    Each has its name, paper, summary, needs, whether any of these is captured inside the vision tower, whether it
    merges, whether it compares the frames of a video and prunes no images, and its default options.
    """
    from promprune_vllm.core.features import OF_TOWER
    from promprune_vllm.core.registry import methods as registered
    from promprune_vllm.core.registry import options_of

    return [
        {
            "name": name,
            "paper": method.paper,
            "summary": _summary(method),
            "needs": [need.name.lower() for need in method.needs if need.name],
            "reads_tower": bool(method.needs & OF_TOWER),
            "merges": method.merges,
            "over_frames": method.over_frames,
            "options": options_of(method()),
        }
        for name, method in registered().items()
    ]


def _summary(method: type[Selector]) -> str:
    """Return the first line of a method's docstring, which says what it does."""
    return (inspect.getdoc(method) or "").partition("\n")[0]


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "method", "paper", "needs", "prunes", "tokens", "options (defaults)", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for row in rows:
        options = "\n".join(f"{name}={value}" for name, value in row["options"].items())
        merging = "merged" if row["merges"] else "dropped"
        table.add_row(
            row["name"], row["paper"], "\n".join(row["needs"]), PRUNES[row["over_frames"]], merging, options
        )
    Console().print(table)
