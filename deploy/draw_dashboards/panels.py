"""Draws one panel of each kind with matplotlib, in the colors of Grafana's dark theme."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from deploy.draw_dashboards.queries import Line, Prometheus, filled
from deploy.draw_dashboards.units import written

PANEL, TEXT, FAINT, GRID = "#181b1f", "#ccccdc", "#8e8e99", "#2c3036"
_COLORS = {"green": "#73bf69", "yellow": "#fade2a", "orange": "#ff9830", "red": "#f2495c"}
_COLORS |= {"blue": "#5794f2", "purple": "#b877d9", "light-blue": "#8ab8ff"}
_PALETTE = (*_COLORS.values(), "#ffa6b0", "#96d98d", "#ffee52", "#ca95e5", "#ffb357")
MARGIN_INCHES = 0.95
"""Left of a plot, for the labels of its axis."""
_TICK_INCHES = 0.75
_LEGEND_LINES = 4
"""Lines of a legend that fit below a panel; Grafana scrolls the others."""
Series = tuple[str, Line]
"""Name in the legend, and the line."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A panel and where its queries go.

    Args:
        panel: As in the dashboard's JSON.
        source: The range of time.
        values: Those of the dashboard's variables.
    """

    panel: Mapping[str, Any]
    source: Prometheus
    values: Mapping[str, str]

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The panel's unit, thresholds and so on."""
        defaults: Mapping[str, Any] = self.panel["fieldConfig"]["defaults"]
        return defaults

    @property
    def unit(self) -> str:
        """Name of its unit."""
        return str(self.defaults.get("unit", "none"))

    @property
    def nothing(self) -> str:
        """What the panel says if it is empty."""
        return str(self.defaults.get("noValue", "No data"))

    def series(self) -> list[Series]:
        """Return the lines of all queries."""
        return [
            (_named(target["legendFormat"], line.labels), line)
            for target in self.panel["targets"]
            for line in self.source.over_time(filled(target["expr"], self.values))
        ]

    def now(self) -> list[tuple[Mapping[str, str], float]]:
        """Return what the first query has at the end of the range."""
        return self.source.at_the_end(filled(self.panel["targets"][0]["expr"], self.values))


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda label: labels.get(label[1], ""), legend)


def color(name: str) -> str:
    """Return a color of Grafana's by its name, or the same if it is no name."""
    return _COLORS.get(name, name)


def _colors(fixed: Mapping[str, str]) -> dict[str, str]:
    """Return the color of each line: its own, or one that no other line has while there are any."""
    chosen = {name: color(own) for name, own in fixed.items() if own}
    free = [each for each in _PALETTE if each not in chosen.values()]
    for n, name in enumerate(name for name, own in fixed.items() if not own):
        chosen[name] = free[n % len(free)]
    return chosen


def draw_stat(axes: Any, asked: Asked) -> None:
    """Draw one large number in the color of its threshold."""
    axes.axis("off")
    found = asked.now()
    if not found:
        axes.text(0.5, 0.5, asked.nothing, color=FAINT, ha="center", va="center", fontsize=9, wrap=True)
        return
    value = found[0][1]
    steps = asked.defaults["thresholds"]["steps"]
    reached = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
    text = written(value, asked.unit, asked.defaults.get("decimals"))
    axes.text(0.5, 0.5, text, color=color(reached), ha="center", va="center", fontsize=17, fontweight="bold")


def draw_lines(axes: Any, asked: Asked) -> None:
    """Draw lines over time or stacked areas; the legend below has the last and the largest value of each."""
    series = [each for each in asked.series() if each[1].points]
    if not series:
        _say(axes, asked.nothing)
        return
    own = {
        each["matcher"]["options"]: {p["id"]: p["value"] for p in each["properties"]}
        for each in asked.panel["fieldConfig"]["overrides"]
    }
    colors = _colors({name: own.get(name, {}).get("color", {}).get("fixedColor", "") for name, _ in series})
    custom = asked.defaults.get("custom", {})
    right = {name for name, _ in series if own.get(name, {}).get("custom.axisPlacement") == "right"}
    units = {name: own.get(name, {}).get("unit", asked.unit) for name, _ in series}
    times = sorted({at for _, line in series for at in line.points})
    if custom.get("stacking", {}).get("mode") == "normal":
        heights = [[line.points.get(at, 0.0) for at in times] for _, line in series]
        names = [name for name, _ in series]
        axes.stackplot(_clock(times), heights, colors=[colors[name] for name in names], alpha=0.55, lw=1)
    else:
        other = axes.twinx() if right else axes
        for name, line in series:
            values = [line.points.get(at, np.nan) for at in times]
            (other if name in right else axes).plot(_clock(times), values, color=colors[name], lw=1.4)
        if right:
            _scale(other, units[next(iter(right))], None)
    _scale(axes, asked.unit, asked.defaults.get("max"))
    _time_axis(axes, asked.source)
    _legend(axes, [(name, colors[name], units[name], line) for name, line in series])


def draw_heatmap(axes: Any, asked: Asked) -> None:
    """Draw a histogram over time: a row for each bucket."""
    upper = sorted((float(name), line) for name, line in asked.series())
    times = sorted({at for _, line in upper for at in line.points})
    totals = np.array([[line.points.get(at, 0.0) for at in times] for _, line in upper])
    if not totals.size or totals.max() <= 0:
        _say(axes, asked.nothing)
        return
    counts = np.diff(totals, axis=0, prepend=np.zeros((1, len(times))))
    shown = np.where(counts > 1e-9, counts, np.nan) ** asked.panel["options"]["color"]["exponent"]
    scheme = asked.panel["options"]["color"]["scheme"]
    edges = _clock([*times, times[-1] + asked.source.step])
    colors = "turbo" if scheme == "Turbo" else f"{scheme}_r"
    axes.pcolormesh(edges, np.arange(len(upper) + 1), shown, cmap=colors)
    axes.spines[:].set_visible(False)
    every = max(1, len(upper) // 7)
    rows = range(0, len(upper), every)
    axes.set_yticks([row + 1 for row in rows])
    labels = ["∞" if np.isinf(upper[row][0]) else written(upper[row][0], asked.unit) for row in rows]
    axes.set_yticklabels(labels, fontsize=7)
    axes.tick_params(colors=FAINT, length=0)
    _time_axis(axes, asked.source)


def draw_table(axes: Any, asked: Asked) -> None:
    """Draw the labels of each series as a row."""
    axes.axis("off")
    rows = asked.now()
    if not rows:
        _say(axes, asked.nothing)
        return
    (changed,) = asked.panel["transformations"]
    order, names = changed["options"]["indexByName"], changed["options"]["renameByName"]
    columns = sorted(order, key=order.get)
    lines = [
        [names[label] for label in columns],
        *([labels.get(label, "") for label in columns] for labels, _ in rows),
    ]
    for down, line in enumerate(lines[:9]):
        for across, cell in enumerate(line):
            look = {"color": FAINT, "fontweight": "bold"} if down == 0 else {"color": TEXT}
            axes.text(
                across / len(columns), 0.95 - 0.11 * down, cell, fontsize=6.5, va="top", clip_on=True, **look
            )


def _say(axes: Any, text: str) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, text, color=FAINT, ha="center", va="center", fontsize=10)


def _clock(times: Sequence[float]) -> list[datetime]:
    return [datetime.fromtimestamp(at) for at in times]


def _time_axis(axes: Any, source: Prometheus) -> None:
    from matplotlib.dates import DateFormatter

    axes.set_xlim(*_clock([source.start, source.end]))
    ticks = int(axes.figure.get_figwidth() * axes.get_position().width / _TICK_INCHES)
    axes.set_xticks(_clock(np.linspace(source.start, source.end, ticks + 2)[1:-1].tolist()))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    axes.tick_params(axis="x", labelsize=7)


def _scale(axes: Any, unit: str, largest: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_ylim(bottom=0, top=largest)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value, unit)))
    axes.tick_params(colors=FAINT, labelsize=7, length=0)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _legend(axes: Any, entries: Sequence[tuple[str, str, str, Line]]) -> None:
    """Write name, last and largest value of each line below a panel, as far as there is room."""
    place, figure = axes.get_position(), axes.figure
    wide, high = figure.get_figwidth() * place.width, figure.get_figheight() * place.height
    shown = entries if len(entries) <= _LEGEND_LINES else entries[: _LEGEND_LINES - 1]
    columns = ((-MARGIN_INCHES + 0.28, "left"), (wide - 0.85, "right"), (wide, "right"))

    def write(line: int, cells: Sequence[str], shade: str, size: float) -> None:
        down = -(0.22 + 0.155 * line) / high
        for (at, side), cell in zip(columns, cells, strict=False):
            axes.text(
                at / wide, down, cell, transform=axes.transAxes, color=shade, fontsize=size, va="top", ha=side
            )

    write(0, ("Name", "Last", "Max"), FAINT, 6.5)
    for line, (name, shade, unit, points) in enumerate(shown, 1):
        values = [points.points[at] for at in sorted(points.points)]
        write(line, (name, written(values[-1], unit), written(max(values), unit)), TEXT, 7)
        dot = (-MARGIN_INCHES + 0.12) / wide, -(0.28 + 0.155 * line) / high
        axes.plot(*dot, marker="s", ms=4, color=shade, transform=axes.transAxes, clip_on=False)
    if len(shown) < len(entries):
        write(len(shown) + 1, (f"… and {len(entries) - len(shown)} more (Grafana scrolls)",), FAINT, 6.5)


DRAWN = {"stat": draw_stat, "timeseries": draw_lines, "heatmap": draw_heatmap, "table": draw_table}
"""How each kind of panel is drawn."""
