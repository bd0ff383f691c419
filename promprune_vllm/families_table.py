"""The model families as the command line and the README show them."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from promprune_vllm.core.registry import get_method, options_of
from promprune_vllm.engine.families import FAMILIES, Family
from promprune_vllm.markdown import table

COLUMNS = ("architecture", "model", "saliency", "positions", "refused", "calibration of `promprune`")


def describe() -> list[dict[str, Any]]:
    """Every family as plain data; ``mu`` is the one in force, ``mu_source`` where it comes from."""
    return [
        {
            "architecture": architecture,
            "model": family.model,
            "saliency": family.saliency,
            "positions": family.positions,
            "refused": family.refused,
            "mu": _mu(family),
            "mu_source": family.calibrated,
        }
        for architecture, family in FAMILIES.items()
    ]


def calibration(row: dict[str, Any]) -> str:
    """Say which ``mu`` a row of ``describe`` has, and where it comes from."""
    return f"mu {row['mu']} ({row['mu_source']})"


def show(console: Console) -> None:
    """Print the families one below the other: side by side, their sentences would be columns of single words."""
    table = Table.grid(padding=(0, 2))
    for row in describe():
        table.add_row(f"[bold]{row['model']}", row["architecture"])
        for name in ("saliency", "positions", "refused"):
            table.add_row(f"  {name}", row[name])
        table.add_row("  promprune", calibration(row))
    console.print(table, highlight=False)


def markdown() -> str:
    """Render the README's table of families."""
    rows = [
        (
            f"`{row['architecture']}`",
            row["model"],
            row["saliency"],
            row["positions"],
            row["refused"],
            calibration(row),
        )
        for row in describe()
    ]
    return table(COLUMNS, rows)


def _mu(family: Family) -> float:
    options = options_of(get_method("promprune", **family.calibration.get("promprune", {})))
    return float(options["mu"])
