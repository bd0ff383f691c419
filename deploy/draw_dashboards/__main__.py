"""``python -m deploy.draw_dashboards --prometheus URL --out DIR`` draws each dashboard as one PNG.

It runs the queries of every panel and draws what they return in the dashboard's own grid: titles, units, legends,
colors of thresholds and the words of empty panels are those of the JSON. It is no Grafana: what only a browser has
(tooltips, zooming, links) is not drawn. Needs matplotlib: ``pip install 'promprune-vllm[eval]'``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.draw_dashboards.panels import DRAWN, MARGIN_INCHES, PANEL, TEXT, Asked
from deploy.draw_dashboards.queries import DrawError, Prometheus

FOLDER = Path(__file__).resolve().parents[1] / "grafana" / "dashboards"
_BACK, _EDGE = "#111217", "#24272d"
_MARGINS = {
    **{"stat": (0.1, 0.1), "table": (0.14, 0.1)},
    **{"timeseries": (MARGIN_INCHES, 1.02), "heatmap": (MARGIN_INCHES, 0.3)},
}
"""Kind of panel -> inches left of its content and below it."""
_COLUMN_INCHES, _LINE_INCHES, _DPI = 0.62, 0.36, 100


def draw(
    document: Mapping[str, Any], panels: Sequence[Mapping[str, Any]], source: Prometheus, target: Path
) -> None:
    """Draw panels of a dashboard, where they are in its grid.

    Args:
        document: The dashboard's JSON.
        panels: Those of it to draw.
        source: The range of time to draw.
        target: PNG file to write.

    Raises:
        DrawError: Prometheus does not answer, or refuses a query.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    top = min(panel["gridPos"]["y"] for panel in panels)
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) - top
    size = 24 * _COLUMN_INCHES, lines * _LINE_INCHES
    figure = Figure(figsize=size, facecolor=_BACK, dpi=_DPI)
    values = source.variables(document)
    for panel in panels:
        at = panel["gridPos"]
        left, bottom = at["x"] / 24, 1 - (at["y"] - top + at["h"]) / lines
        _draw_panel(figure, Asked(panel, source, values), (left, bottom, at["w"] / 24, at["h"] / lines))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, facecolor=_BACK)
    with Image.open(target) as picture:
        small = picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)  # a third of the file's size
    small.save(target, optimize=True)


def panels_of(document: Mapping[str, Any], row: str | None) -> list[Mapping[str, Any]]:
    """Return the panels of a dashboard, or of one of its rows; none if it has no such row."""
    rows = {panel["title"]: panel["gridPos"]["y"] for panel in document["panels"] if panel["type"] == "row"}
    if row is None:
        return list(document["panels"])
    start = rows.get(row, 10**6)
    end = min((y for y in rows.values() if y > start), default=10**6)
    return [panel for panel in document["panels"] if start <= panel["gridPos"]["y"] < end]


def _draw_panel(figure: Any, asked: Asked, place: tuple[float, float, float, float]) -> None:
    """Draw a panel: a box with the title at its top, and the content in it."""
    left, bottom, width, height = place
    inch = 1 / figure.get_figwidth(), 1 / figure.get_figheight()
    title, top = asked.panel["title"], bottom + height
    if asked.panel["type"] == "row":
        figure.text(left + 0.1 * inch[0], bottom + height / 2, f"▾ {title}", color=TEXT, fontsize=11, va="center")
        return
    gap, kind = 0.04, asked.panel["type"]
    frame = figure.add_axes(
        (left + gap * inch[0], bottom + gap * inch[1], width - 2 * gap * inch[0], height - 2 * gap * inch[1]),
        facecolor=PANEL,
    )
    frame.set(xticks=(), yticks=())
    frame.spines[:].set_color(_EDGE)
    look = {"color": TEXT, "fontsize": 9, "va": "top", "fontweight": "bold"}
    figure.text(left + 0.14 * inch[0], top - 0.12 * inch[1], title, **look)
    before, below = _MARGINS[kind]
    after = before if "custom.axisPlacement" in json.dumps(asked.panel["fieldConfig"]) else 0.2
    inside = width - (before + after) * inch[0], height - (below + 0.42) * inch[1]
    axes = figure.add_axes((left + before * inch[0], bottom + below * inch[1], *inside), facecolor=PANEL)
    DRAWN[asked.panel["type"]](axes, asked)


def main() -> int:
    """Draw both dashboards, or some rows of them."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.draw_dashboards", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--prometheus", required=True, metavar="URL", help="address of a Prometheus")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--minutes", type=float, default=30, help="how far back (default: 30, as the dashboards)")
    parser.add_argument("--row", metavar="TITLE", help="only this row, of the dashboards that have it")
    arguments = parser.parse_args()
    end = time.time()
    source = Prometheus(arguments.prometheus.rstrip("/"), end - 60 * arguments.minutes, end)
    try:
        documents = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
        chosen = {name: panels_of(document, arguments.row) for name, document in documents.items()}
        if not any(chosen.values()):
            raise DrawError(f"no dashboard has a row {arguments.row!r}")
        for name, panels in chosen.items():
            if panels:
                target = arguments.out / f"{name}.png"
                draw(documents[name], panels, source, target)
                print(target)
    except (DrawError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
