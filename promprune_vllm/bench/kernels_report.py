"""The tables of ``promprune bench kernels``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Times = Mapping[str, Mapping[str, float]]


def show(result: Mapping[str, Any]) -> None:
    """Print a result as tables. Ratios compare medians of the same run."""
    console = Console()
    versions = result["versions"]
    console.print(
        f"{result['machine']}, {result['cores']} cores, {result['threads']} thread(s), torch {versions['torch']}, "
        f"numba {versions['numba']}; features: {result['features']}; {result['repeats']} repeats; "
        f"load before {result['load_before']}\n{result['command']}",
        soft_wrap=True,
    )
    measured = [row for row in result["cases"] if "skipped" not in row]
    title = f"{result['clock']} in ms: median (min … max)"
    console.print(_whole(measured, title), _stages(measured, title), _entropy(result["entropy"]))
    for row in result["cases"]:
        if "skipped" in row:
            console.print(f"{row['case']} was skipped: {row['skipped']}")


def show_cuda(result: Mapping[str, Any]) -> None:
    """Print the result of a GPU run."""
    console = Console()
    console.print(
        f"{result['gpu']}, CUDA {result['cuda']}, torch {result['versions']['torch']}; {result['path']}; "
        f"features: {result['features']}; {result['repeats']} repeats\n{result['command']}",
        soft_wrap=True,
    )
    table = Table(title=f"{result['clock']} in ms: median (min … max)", title_justify="left")
    for name in ("case", "what", "ms", "tokens unlike float64", "memory, MiB"):
        table.add_column(name)
    for row in result["cases"]:
        for name, times in row["whole"].items():
            ours = name in {"eager", "graph"}
            more = (str(row["other_tokens"]), f"{row['memory_bytes'] / 2**20:.0f}") if ours else ("", "")
            table.add_row(row["case"], name, _spread(times), *more)
    console.print(table)


def _whole(rows: list[Mapping[str, Any]], title: str) -> Table:
    table = Table(title=f"Whole selection, {title}", title_justify="left")
    for name in ("case", "ours", "plain float32", "float64 reference", "plain / ours", "reference / ours"):
        table.add_column(name)
    table.add_column("plain: tokens unlike float64")
    table.add_column("memory, N² float32")
    table.add_column("promprune-video")
    for row in rows:
        whole: Times = row["whole"]
        memory = row["memory_in_matrices"]
        table.add_row(
            row["case"],
            *(_spread(whole[name]) for name in ("ours", "plain", "reference")),
            _ratio(whole, "plain", "ours"),
            _ratio(whole, "reference", "ours"),
            str(row["plain_flips"]),
            "?" if memory is None else f"{memory:.1f}",
            _spread(whole["promprune-video"]) if "promprune-video" in whole else "",
        )
    return table


def _stages(rows: list[Mapping[str, Any]], title: str) -> Table:
    table = Table(title=f"One image by stage, {title}", title_justify="left")
    for name in ("case", "stage", "ours", "plain float32", "float64 reference", "plain / ours"):
        table.add_column(name)
    for row in rows:
        times: Times = row["stages"]
        for stage, ours, plain, reference in (
            ("Gram", "ours gram", "plain grams", "reference gram"),
            ("entropy", "ours entropy", "plain entropy", "reference entropy"),
            ("greedy loop", "ours loop", "plain loop", "reference loop"),
            ("loop + decision", "ours loop and decision", "plain loop", "reference loop"),
        ):
            spreads = (_spread(times[name]) for name in (ours, plain, reference))
            table.add_row(row["case"], stage, *spreads, _ratio(times, plain, ours))
    table.caption = (
        "Plain computes two Grams; the reference's entropy includes another. Decision: our float64 part."
    )
    return table


def _entropy(rows: list[Mapping[str, Any]]) -> Table:
    table = Table(title="Entropy of 576 x 4096 tokens against float64; splits of K = 64", title_justify="left")
    for name in (
        "spectrum",
        "H",
        "error of ours",
        "error of plain float32",
        "splits that differ, ours",
        "plain",
        "by",
    ):
        table.add_column(name)
    for row in rows:
        ours, plain = row["ours"], row["plain"]
        table.add_row(
            row["family"],
            f"{row['entropy']:.4f}",
            f"{ours['error']:.1e}",
            f"{plain['error']:.1e}",
            f"{ours['splits_that_differ']:.1%}",
            f"{plain['splits_that_differ']:.1%}",
            f"{max(ours['most_tokens'], plain['most_tokens'])} token(s)",
        )
    return table


def _spread(times: Mapping[str, float]) -> str:
    return f"{_ms(times['median'])} ({_ms(times['min'])} … {_ms(times['max'])})"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(times: Times, slow: str, fast: str) -> str:
    return f"{times[slow]['median'] / times[fast]['median']:.1f}x"
