"""``promprune families``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promprune_vllm.markdown import table

if TYPE_CHECKING:
    from promprune_vllm.engine.families import Family

_COLUMNS = (
    *("architecture", "model", "tokens of 1024 x 1024 pixels", "saliency", "positions", "videos", "refused"),
    "calibration of `promprune`",
)


def families(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/models.md.")] = False,
) -> None:
    """List the model families that can be pruned, and what each of them refuses."""
    if as_markdown:
        typer.echo(markdown())
    elif as_json:
        typer.echo(json.dumps(describe(), indent=2))
    else:
        _show(describe())


def describe() -> list[dict[str, Any]]:
    """Describe every family as plain data.

    ``mu`` is its default, ``mu_source`` where that comes from, ``mu_measured`` whether it is of the family's own
    vision tower, and ``megapixel_tokens`` the visual tokens of 1024 x 1024 pixels before pruning; ``None`` if the
    model takes no images.
    """
    from promprune_vllm.engine.families import FAMILIES

    return [
        {
            "architecture": architecture,
            "model": family.model,
            "megapixel_tokens": family.megapixel_tokens,
            "saliency": family.saliency,
            "positions": family.positions,
            "videos": family.videos,
            "refused": family.refused,
            "mu": _mu(family),
            "mu_source": family.calibrated,
            "mu_measured": family.measured,
        }
        for architecture, family in FAMILIES.items()
    ]


def markdown() -> str:
    """Render the table of families in docs/models.md."""
    rows = [
        (
            f"`{row['architecture']}`",
            row["model"],
            _tokens(row),
            row["saliency"],
            row["positions"],
            row["videos"],
            row["refused"],
            _calibration(row),
        )
        for row in describe()
    ]
    return table(_COLUMNS, rows)


def _show(rows: list[dict[str, Any]]) -> None:
    """Print one family per block: as a table, its sentences would become columns one word wide."""
    from rich.console import Console
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(f"[bold]{row['model']}", row["architecture"])
        of_pixels = "" if row["megapixel_tokens"] is None else " of 1024 x 1024 pixels, before pruning"
        grid.add_row("  tokens", f"{_tokens(row)}{of_pixels}")
        for name in ("saliency", "positions", "videos", "refused"):
            grid.add_row(f"  {name}", row[name])
        grid.add_row("  promprune", _calibration(row))
    Console().print(grid, highlight=False)


def _tokens(row: dict[str, Any]) -> str:
    return "takes no images" if row["megapixel_tokens"] is None else f"{row['megapixel_tokens']:,}"


def _calibration(row: dict[str, Any]) -> str:
    """Format the ``mu`` of a row of ``describe``, and where it comes from."""
    return f"mu {row['mu']} ({row['mu_source']})"


def _mu(family: Family) -> float:
    from promprune_vllm.core.registry import get_method, options_of

    options = options_of(get_method("promprune", **family.calibration.get("promprune", {})))
    return float(options["mu"])
