"""The tables and advice that ``promprune calibrate`` prints."""

from __future__ import annotations

import json
import shlex

from rich.console import Console
from rich.table import Table

from promprune_vllm.core.calibration import SATURATION, SHARES, CalibrationReport, histogram, quantile

_BINS, _BAR = 12, 40
_LABELS = {"p5": "5%", "p25": "25%", "p75": "75%", "p95": "95%"}


def show(report: CalibrationReport, console: Console) -> None:
    """Print the figures, the distribution, and the server option that sets the suggested ``mu``."""
    entropies = report.entropies
    tokens = sorted(image.tokens for image in report.images)
    few, usual, many = (quantile(tokens, SHARES[name]) for name in ("min", "median", "max"))
    console.print(
        f"{len(report.images)} images, {few:g} / {usual:g} / {many:g} tokens per image (min / median / max).",
        highlight=False,
    )
    if len(entropies) != len(report.images):
        console.print(
            f"Each tile of an image has its own statistics: the figures below are for {len(entropies)} tiles.",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_distribution(entropies, str(report.options["entropy"])))
    console.print(_histogram(entropies))
    console.print(_advice(report), highlight=False, soft_wrap=True)


def option(report: CalibrationReport) -> str:
    """Return the option of ``promprune serve`` that sets the new ``mu``."""
    return f"--visual-token-method-options {shlex.quote(json.dumps(report.method_options()))}"


def _distribution(entropies: list[float], kind: str) -> Table:
    table = Table(title=f"H, the {kind} entropy", title_justify="left")
    for name in SHARES:
        table.add_column(_LABELS.get(name, name), justify="right")
    table.add_row(*(f"{quantile(entropies, share):.4f}" for share in SHARES.values()))
    return table


def _histogram(entropies: list[float]) -> Table:
    table = Table("from H", "", box=None, pad_edge=False)
    table.add_column("", justify="right")
    counted = histogram(entropies, _BINS)
    most = max(count for _, count in counted)
    for edge, count in counted:
        table.add_row(f"{edge:.4f}", "█" * round(_BAR * count / most), str(count))
    return table


def _advice(report: CalibrationReport) -> str:
    far, in_force = SATURATION * report.options["tau"], float(report.options["mu"])
    now, then = _percent(report.saturated(in_force)), _percent(report.saturated(report.mu))
    return (
        f"\nSuggested mu: {report.mu}, {_why(report)}. Where H is more than {SATURATION:g} tau = {far:g} "
        f"away from mu, the split hardly depends on H:\nthat is {then} with this mu, {now} with the mu in force, "
        f"{in_force}.\n\n{option(report)}"
    )


def _why(report: CalibrationReport) -> str:
    medians = report.medians
    if len(medians) == 1:
        return "the median"
    each = ", ".join(f"{name} {median:.4f}" for name, median in medians.items())
    return f"the midpoint between the medians of the folders ({each}); the median of all is {report.median}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
