"""Markdown tables for the command line, reports and the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a table in GitHub's Markdown, without a trailing newline."""
    return "\n".join(_line(cells) for cells in (columns, ("---",) * len(columns), *rows))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
