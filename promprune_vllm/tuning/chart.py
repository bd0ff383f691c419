"""The curves of the report as one SVG: unchanged answers against tokens, by budget and threshold."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from promprune_vllm.tuning.summary import Cell, Row, Summary
from promprune_vllm.tuning.text import gives, named

_WIDTH, _HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 24, 16, 56
_COLOURS = 6  # classes in the style sheet
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def chart(summary: Summary) -> str:
    """Return the SVG. Lines are first tries with one budget, by rising threshold; controls are single points."""
    rows = [row for row in summary.rows if not row.is_control]
    shown = [row.cells[0].unchanged.value for row in rows]
    if summary.level is not None:
        shown.append(summary.level.unchanged.low)
    scale = _Scale(max(0.0, min(shown, default=0.0) - 0.002))  # a control may be far below
    parts = [*_axes(scale), *_goal(scale, summary.goal)]
    for row in summary.rows:
        if row.is_control:
            parts.append(_control(scale, row))
    for place, row in enumerate(rows):
        parts += _line(scale, row, place % _COLOURS)
    if summary.level is not None:
        parts += _marked(scale, summary.level)
    label = "Unchanged answers by share of visual tokens; the tables below have the numbers"
    body = "".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{body}</svg>'


def legend(summary: Summary) -> str:
    """Return what the marks of the chart mean, as HTML."""
    rows = [row for row in summary.rows if not row.is_control]
    lines = [
        f'<li><span class="key c{place % _COLOURS}"></span>{escape(row.method)}, first try '
        f"{escape(row.budget)}</li>"
        for place, row in enumerate(rows)
    ]
    controls = dict.fromkeys(row.method for row in summary.rows if row.is_control)
    lines += [
        f'<li><span class="key {name}"></span>{escape(name)}, never asked again (▽: below the axis)</li>'
        for name in controls
    ]
    mark = "recommended" if summary.chosen else "best, but not shown to reach the goal"
    lines.append(f'<li><span class="key chosen"></span>{mark}, with its interval</li>')
    return f'<ul class="legend">{"".join(lines)}</ul>'


class _Scale:
    """From shares to pixels.

    Args:
        lowest: Share of unchanged answers at the bottom.
    """

    def __init__(self, lowest: float) -> None:
        self.step = next((step for step in _STEPS if (1 - lowest) / step <= 6), _STEPS[-1])
        self.lowest = max(0.0, self.step * int(lowest / self.step))

    def x(self, tokens: float) -> float:
        return round(_LEFT + min(tokens, 1.05) / 1.05 * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, unchanged: float) -> float:
        above = (max(unchanged, self.lowest) - self.lowest) / (1 - self.lowest)
        return round(_HEIGHT - _BOTTOM - above * (_HEIGHT - _TOP - _BOTTOM), 1)


def _axes(scale: _Scale) -> Iterator[str]:
    left, right, bottom = scale.x(0), scale.x(1.05), scale.y(scale.lowest)
    value = scale.lowest
    while value < 1 + 1e-9:
        y = scale.y(value)
        yield f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{100 * value:.3g}%</text>'
        value += scale.step
    for value in _TICKS:
        x = scale.x(value)
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 5}"/>'
        yield f'<text x="{x}" y="{bottom + 24}" text-anchor="middle">{100 * value:.0f}%</text>'
    middle = (left + right) / 2
    yield f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">visual tokens, share of all</text>'


def _goal(scale: _Scale, goal: float) -> Iterator[str]:
    if goal >= scale.lowest:
        y = scale.y(goal)
        yield f'<line class="goal" x1="{scale.x(0)}" x2="{scale.x(1.05)}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{scale.x(1.05)}" y="{y + 14}" text-anchor="end">goal</text>'


def _line(scale: _Scale, row: Row, colour: int) -> Iterator[str]:
    cells = [cell for cell in row.cells if cell.share <= 1.05]
    points = " ".join(f"{scale.x(cell.share)},{scale.y(cell.unchanged.value)}" for cell in cells)
    yield f'<polyline class="c{colour}" points="{points}"/>'
    for cell in cells:
        x, y = scale.x(cell.share), scale.y(cell.unchanged.value)
        yield f'<circle class="c{colour}" cx="{x}" cy="{y}" r="4">{_title(cell)}</circle>'


def _control(scale: _Scale, row: Row) -> str:
    cell = row.cells[0]
    x, y = scale.x(cell.share), scale.y(cell.unchanged.value)
    if cell.unchanged.value < scale.lowest:
        points = f"{x - 5},{y - 12} {x + 5},{y - 12} {x},{y - 2}"
        return f'<polygon class="{row.method}" points="{points}">{_title(cell)}</polygon>'
    return f'<rect class="{row.method}" x="{x - 4}" y="{y - 4}" width="8" height="8">{_title(cell)}</rect>'


def _marked(scale: _Scale, cell: Cell) -> Iterator[str]:
    x, low, high = scale.x(cell.share), scale.y(cell.unchanged.low), scale.y(cell.unchanged.high)
    yield f'<line class="chosen" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>'
    yield f'<circle class="chosen" cx="{x}" cy="{scale.y(cell.unchanged.value)}" r="8"/>'


def _title(cell: Cell) -> str:
    text = f"{cell.method}, {named(cell)}: {gives(cell)}"
    return f"<title>{escape(text)}</title>"
