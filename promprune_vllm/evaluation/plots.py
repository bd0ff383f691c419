"""Plots of a report, as PNG and SVG. Needs matplotlib: ``pip install 'promprune-vllm[eval]'``."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.escalation import Curve
from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.report import CONTROLS, FIXED_SPLITS, SUBJECT, Report
from promprune_vllm.evaluation.statistics import Estimate, Numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUBJECT_COLOUR, _FULL_COLOUR, _CONTROL_COLOUR = "#b2182b", "#222222", "#777777"
# No red or grey: those are for the subject and the controls. Fixed splits share one hue, darker for larger shares.
_COLOURS = ("#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#c49c00", "#006d5b")
_SPLIT_COLOURS = ("#9ecae1", "#6baed6", "#3182bd", "#08306b")
_AGAIN_COLOURS = {"random": "#999999", "uniform": "#4477aa", "downsample": "#228833"}
_FORMATS = ("png", "svg")
_AS_LEVEL = "that of all tokens, minus the loss on the same questions"
_CURVES, _HEAT, _AGAIN = "accuracy-budget", "tasks", "asking-again"
_FIRST_TRIES = ("64", "32")


def require() -> None:
    """Fail without matplotlib, before an hour is spent on asking.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            f"Plots need matplotlib ({error}): run `pip install 'promprune-vllm[eval]'`, or pass --no-plots."
        ) from error


def save(report: Report, folder: Path) -> list[Path]:
    """Save a plot of accuracy by budget, a heat map of tasks for every budget, and a plot of asking again.

    Returns:
        The files written.
    """
    import matplotlib as mpl

    figures = {_CURVES: curves(report)}
    figures |= {f"{_HEAT}-{budget.strip('%')}": heat_map(report, budget) for budget in report.budgets}
    if report.curves:
        figures[_AGAIN] = asking_again(report)
    written = []
    # Reproducible bytes, so that plots can be committed.
    with mpl.rc_context({"svg.hashsalt": "promprune", "svg.fonttype": "path"}):
        for name, figure in figures.items():
            for kind in _FORMATS:
                file = folder / f"{name}.{kind}"
                metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
                figure.savefig(file, dpi=150, metadata=metadata)
                written.append(file)
    return written


def curves(report: Report) -> Figure:
    """Plot the macro accuracy and that of every task by tokens kept: :meth:`Report.level`."""
    figure = _figure(11, 2.7 * (1 + math.ceil(len(report.tasks) / 3)) + 1.2)
    rows = 2 + math.ceil(len(report.tasks) / 3)
    grid = figure.add_gridspec(rows, 3)
    wide = figure.add_subplot(grid[:2, :])
    _curve(wide, report, None, f"Macro accuracy ({_AS_LEVEL})")
    wide.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    for place, task in enumerate(report.tasks):
        _curve(figure.add_subplot(grid[2 + place // 3, place % 3]), report, task, task)
    return figure


def heat_map(report: Report, budget: str) -> Figure:
    """Plot :meth:`Report.level` for every task (columns) and method (rows) at one budget."""
    tasks: list[str | None] = [*report.tasks, None]
    values, names = [], []
    full = report.cell(FULL_METHOD)
    if full is not None:
        values.append([_percent(full.estimate(task)) for task in tasks])
        names.append("all tokens")
    for method in report.methods:
        if report.cell(method, budget) is not None:
            values.append([_percent(report.level(method, budget, task)) for task in tasks])
            names.append(method)
    columns = [*report.tasks, "macro"]
    figure = _figure(1.5 + 0.85 * len(columns), 1.3 + 0.33 * len(names))
    axes = figure.add_subplot()
    axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=_ink(value), fontsize=8)
    axes.axvline(len(columns) - 1.5, color="white", linewidth=3)
    axes.set_title(
        f"Accuracy by task, %, {budget} of {_seen(report)} visual tokens kept\n({_AS_LEVEL})", fontsize=10
    )
    return figure


def asking_again(report: Report) -> Figure:
    """Plot macro accuracy by mean tokens, of fixed budgets and of asking again: with the controls; close up."""
    subject = report.methods[0]
    controls = [name for name in CONTROLS if name in report.methods and name != subject]
    figure = _figure(11, 4.8)
    wide, close = figure.subplots(1, 2)
    for axes, methods in ((wide, [subject, *controls]), (close, [subject])):
        for method in methods:
            _again(axes, report, method, errors=axes is close)
        _again_axes(axes, report)
    named = wide.get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=5, frameon=False, fontsize=8)  # it would hide curves
    close.set_title(f"{subject} alone, ± one standard error of the difference to all tokens", fontsize=9)
    lines = [_raised(report, curve) for curve in _first_tries(report, subject)]
    if lines:
        close.set_xlim(left=0.8 * min(tokens[0] for tokens, _ in lines))
        close.set_ylim(min(levels[0] for _, levels in lines) - 2, max(levels[-1] for _, levels in lines) + 2)
    return figure


def _again(axes: Any, report: Report, method: str, *, errors: bool) -> None:
    """Draw a method's fixed budgets as points, and asking again as lines that start at some of them."""
    colour = _AGAIN_COLOURS.get(method, _SUBJECT_COLOUR)
    cells = [cell for budget in report.budgets if (cell := report.cell(method, budget)) is not None]
    levels = [(cell.kept, level) for cell in cells if (level := report.level(method, cell.budget)) is not None]
    kept, fixed = [kept for kept, _ in levels], [100 * level.value for _, level in levels]
    axes.plot(kept, fixed, color=colour, marker="o", markersize=4, linestyle=":", label=f"{method}, fixed budget")
    if errors:
        axes.errorbar(kept, fixed, yerr=[_error(level) for _, level in levels], fmt="none", ecolor=colour)
    label = f"{method}, asking again"
    for curve in _first_tries(report, method):
        tokens, raised = _raised(report, curve)
        axes.plot(tokens, raised, color=colour, linewidth=1.8, label=label)
        label = ""
        if errors:
            spread = np.array([_error(point.difference) for point in curve.points])
            axes.fill_between(tokens, raised - spread, raised + spread, color=colour, alpha=0.15, linewidth=0)


def _again_axes(axes: Any, report: Report) -> None:
    full = report.cell(FULL_METHOD)
    if full is not None:
        accuracy = _percent(full.macro)
        axes.plot([full.kept], [accuracy], color=_FULL_COLOUR, marker="D", linestyle="", label="all tokens")
        axes.axhline(accuracy, color=_FULL_COLOUR, linestyle=":", linewidth=1.2)
    _log_axis(axes, {round(cell.kept) for cell in report.cells})
    axes.set_xlabel("mean visual tokens per question, both tries", fontsize=8)
    axes.set_ylabel("macro accuracy, %", fontsize=8)


def _first_tries(report: Report, method: str) -> list[Curve]:
    budgets = [budget for budget in report.budgets if budget in _FIRST_TRIES] or report.budgets[-2:]
    return [curve for budget in budgets if (curve := report.curve(method, budget)) is not None]


def _raised(report: Report, curve: Curve) -> tuple[list[float], Numbers]:
    """Return mean tokens and accuracies in percent of a curve, which starts at the level of its first tries."""
    level = report.level(curve.method, curve.budget)
    assert level is not None, "a curve is computed from the answers of a cell"
    start = level.value - curve.points[0].right.value
    accuracies = np.array([100 * (start + point.right.value) for point in curve.points])
    return [point.tokens for point in curve.points], accuracies


def _log_axis(axes: Any, ticks: Collection[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.25)
    axes.tick_params(labelsize=8)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: needs no display, and has no global state

    return Figure(figsize=(width, height), layout="constrained")


def _curve(axes: Any, report: Report, task: str | None, title: str) -> None:
    full = report.cell(FULL_METHOD)
    for place, method in enumerate(report.methods):
        cells = [cell for budget in report.budgets if (cell := report.cell(method, budget)) is not None]
        levels = [(cell.kept, level) for cell in cells if (level := report.level(method, cell.budget, task))]
        axes.errorbar(
            [kept for kept, _ in levels],
            [100 * level.value for _, level in levels],
            yerr=[_error(level) for _, level in levels],
            label=method,
            **_style(method, place),
        )
    if full is not None and (whole := full.estimate(task)) is not None:
        axes.axhline(_percent(whole), color=_FULL_COLOUR, linestyle=":", linewidth=1.2, label="all tokens")
    _log_axis(axes, {round(cell.kept) for cell in report.cells if cell.method != FULL_METHOD})
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("visual tokens kept", fontsize=8)
    axes.set_ylabel("%", fontsize=8)


def _style(method: str, place: int) -> dict[str, Any]:
    if method == SUBJECT:
        return {"color": _SUBJECT_COLOUR, "linewidth": 2.4, "marker": "o", "markersize": 4, "zorder": 5}
    if method in CONTROLS:
        return {
            "color": _CONTROL_COLOUR,
            "linewidth": 1.2,
            "linestyle": _dashes(method),
            "marker": ".",
            "markersize": 4,
        }
    thin = {"linewidth": 1.0, "marker": ".", "markersize": 4}
    if method in FIXED_SPLITS[:-1]:
        return {"color": _SPLIT_COLOURS[FIXED_SPLITS.index(method)], "linestyle": "--", **thin}
    return {"color": _COLOURS[place % len(_COLOURS)], **thin}


def _dashes(control: str) -> str:
    return (":", "-.", "--")[CONTROLS.index(control) % 3]


def _percent(estimate: Estimate | None) -> float:
    return math.nan if estimate is None else 100 * estimate.value


def _error(estimate: Estimate) -> float:
    return 0 if math.isnan(estimate.error) else 100 * estimate.error


def _ink(value: float) -> str:
    return "white" if value < 60 else "black"


def _seen(report: Report) -> str:
    seen: Sequence[int] = sorted({answer.seen for answer in report.records.answers.values()})
    return str(seen[0]) if len(seen) == 1 else f"{seen[0]} to {seen[-1]}"
