"""What ``promprune eval --clips`` has measured, as Markdown, as a table for the terminal, and as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from promprune_vllm.evaluation.report import CONTROLS
from promprune_vllm.markdown import table as markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = "random,uniform,promprune,prunesid,evs,vidcom2,promprune-video"
BUDGETS = "3.125%,6.25%,12.5%,25%"
CONTROL_KINDS = ("pan", "still")
"""Kinds that are left out of the means: in the others something happens before a camera that stands still."""
NOTE = (
    "± is one standard error over clips; 0.0 means that all clips came out alike, which more clips could refute. "
    "**No model answered anything**: a kept token shows an event, and what a model makes of it was not measured."
)
PLOT = "clips"
_TITLES = {"half": "at least half of the tokens of every event", "some": "at least one token of every event"}
_COLOURS = ("#ff7f0e", "#2ca02c", "#9467bd", "#1f77b4", "#8c564b", "#e377c2")
_SUBJECT, _SUBJECT_COLOUR, _CONTROL_COLOUR = "promprune-video", "#b2182b", "#777777"

Document = Mapping[str, Any]


def markdown(document: Document) -> str:
    """Return all tables."""
    keeps, kinds = _keeps(document), _kinds(document)
    parts = []
    for field, title in _TITLES.items():
        parts.append(f"Clips that keep {title}, %, mean of {', '.join(_events(document))}:")
        columns = [(field, _events(document), keep) for keep in keeps]
        parts.append(_table(document, [_label(document, keep) for keep in keeps], columns))
    for keep in keeps[:2]:
        parts.append(f"By kind, {_TITLES['half']}, {_label(document, keep)}, %:")
        parts.append(_table(document, kinds, [("half", (kind,), keep) for kind in kinds]))
    parts.append(f"Share of the kept tokens that are of the first frame, {_label(document, keeps[0])}, %:")
    parts.append(_table(document, kinds, [("first", (kind,), keeps[0]) for kind in kinds]))
    return "\n\n".join([*parts, NOTE, provenance_line(document)]) + "\n"


def half_table(document: Document) -> str:
    """Return the first table of ``markdown``."""
    keeps = _keeps(document)
    columns = [("half", _events(document), keep) for keep in keeps]
    return _table(document, [_label(document, keep) for keep in keeps], columns)


def provenance_line(document: Document) -> str:
    """Return what was measured, where, and with which command."""
    clips, size = document["rows"][0]["clips"], f"{document['frames']} frames, {document['tokens']} tokens"
    return (
        f"{clips} clips of each kind, {size}, split {document['split']}; run on {document['machine']}, "
        f"{document['cores']} cores, commit {document['commit']}: `{document['command']}`."
    )


def terminal(document: Document) -> Table:
    """Return the first table of ``markdown`` for a terminal."""
    keeps = _keeps(document)
    shown = Table(title=f"Clips that keep {_TITLES['half']}, %", title_justify="left")
    shown.add_column("method")
    for keep in keeps:
        shown.add_column(_label(document, keep), justify="right")
    for method in _methods(document):
        shown.add_row(method, *(_cell(document, method, "half", _events(document), keep) for keep in keeps))
    return shown


def save_plot(document: Document, folder: Path) -> list[Path]:
    """Save a plot as PNG and SVG; return the files."""
    import matplotlib as mpl

    figure = plot(document)
    written = []
    with mpl.rc_context({"svg.hashsalt": "promprune", "svg.fonttype": "path"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            written.append(folder / f"{PLOT}.{kind}")
            figure.savefig(written[-1], dpi=150, metadata=metadata)
    return written


def plot(document: Document) -> Figure:
    """Plot both figures by budget, for events before a still camera and before a moving one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = [(field, kinds) for kinds in (_events(document), ("pan",)) for field in _TITLES]
    for axes, (field, kinds) in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, panels, strict=True):
        for place, method in enumerate(_methods(document)):
            figures = [estimate(document, method, field, kinds, keep) for keep in _keeps(document)]
            axes.errorbar(
                _keeps(document),
                [100 * value for value, _ in figures],
                yerr=[0 if math.isnan(error) else 100 * error for _, error in figures],
                label=method,
                **_style(method, place),
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(_keeps(document), [_label(document, keep) for keep in _keeps(document)])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.25)
        axes.tick_params(labelsize=8)
        camera = "the camera moves" if kinds == ("pan",) else "the camera stands still"
        axes.set_title(f"{_TITLES[field]}: {camera}", fontsize=9)
        axes.set_ylabel("clips, %", fontsize=8)
    figure.axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return figure


def estimate(document: Document, method: str, field: str, kinds: Sequence[str], keep: int) -> tuple[float, float]:
    """Return the mean over kinds of a figure, and its standard error."""
    found = [
        row[field]
        for row in document["rows"]
        if (row["method"], row["kept"]) == (method, keep) and row["kind"] in kinds
    ]
    return (
        sum(value for value, _ in found) / len(found),
        math.sqrt(sum(error**2 for _, error in found)) / len(found),
    )


def _table(document: Document, head: Sequence[str], columns: Sequence[tuple[str, Sequence[str], int]]) -> str:
    rows = [
        [f"`{method}`", *(_cell(document, method, *column) for column in columns)] for method in _methods(document)
    ]
    return markdown_table(["method", *head], rows)


def _cell(document: Document, method: str, field: str, kinds: Sequence[str], keep: int) -> str:
    value, error = estimate(document, method, field, kinds, keep)
    return f"{100 * value:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")


def _keeps(document: Document) -> list[int]:
    return sorted({row["kept"] for row in document["rows"]})


def _kinds(document: Document) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in document["rows"]))


def _events(document: Document) -> tuple[str, ...]:
    return tuple(kind for kind in _kinds(document) if kind not in CONTROL_KINDS)


def _methods(document: Document) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in document["rows"]))


def _label(document: Document, keep: int) -> str:
    whole, rest = divmod(document["tokens"], keep)
    return f"1/{whole} ({keep})" if not rest else f"{100 * keep / document['tokens']:.3g}% ({keep})"


def _style(method: str, place: int) -> dict[str, Any]:
    if method == _SUBJECT:
        return {"color": _SUBJECT_COLOUR, "linewidth": 2.4, "marker": "o", "markersize": 4, "zorder": 5}
    if method in CONTROLS:
        dashes = (":", "-.")[CONTROLS.index(method) % 2]
        return {"color": _CONTROL_COLOUR, "linestyle": dashes, "linewidth": 1.2, "marker": ".", "markersize": 4}
    return {"color": _COLOURS[place % len(_COLOURS)], "linewidth": 1.0, "marker": ".", "markersize": 4}
