#!/usr/bin/env python3
"""Write the dashboards: `python deploy/grafana/build_dashboards.py`. A test checks that they are up to date."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for the modules next to this file

import overview  # noqa: E402
import selection  # noqa: E402
from panels import SOURCE  # noqa: E402

FOLDER = HERE / "dashboards"
INTERVALS = ("1m", "5m", "15m", "1h", "6h")


def main() -> None:
    """Write both dashboards."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in documents().items():
        (FOLDER / name).write_text(text)


def documents() -> dict[str, str]:
    """Return the text of each file, by name."""
    dashboards = {"overview.json": build(overview, selection), "selection.json": build(selection, overview)}
    return {name: _text(JSONEncoder().encode(each)) for name, each in dashboards.items()}


def _text(encoded: str) -> str:
    document = json.loads(encoded)
    # Remove fields that the SDK adds but our version of Grafana does not know.
    for variable in document["templating"]["list"]:
        for name in ("auto", "auto_min", "auto_count"):
            variable.pop(name, None)
    for panel in document["panels"]:
        panel.get("options", {}).pop("footer", None)
    return json.dumps(document, sort_keys=True, indent=2) + "\n"


def build(page: ModuleType, other: ModuleType) -> model.Dashboard:
    """Build one dashboard, with a link to the other one."""
    link = dashboard.DashboardLink(other.TITLE).type(model.DashboardLinkType.LINK).url(f"/d/{other.UID}")
    link = link.icon("dashboard").tooltip(other.DESCRIPTION).include_vars(True).keep_time(True)
    built = (
        dashboard.Dashboard(page.TITLE)
        .uid(page.UID)
        .description(page.DESCRIPTION)
        .tags(["promprune", "vllm"])
        .readonly()
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(link)
    )
    for variable in _variables(with_method=page is selection):
        built = built.with_variable(variable)
    number = 0
    for title, panels in page.rows():
        number += 1
        built = built.with_row(dashboard.Row(title).id(number))
        for panel in panels:
            number += 1
            built = built.with_panel(panel.id(number))
    return built.build()


def _variables(*, with_method: bool) -> list[object]:
    source = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    # "All" models includes ones without build info; "All" methods are those that select tokens, not `none`.
    model_name = _label("model", "Model", "label_values(promprune_build_info, model_name)").all_value(".*")
    method = _label(
        "method", "Method", 'label_values(promprune_selection_seconds_count{model_name=~"$model"}, method)'
    )
    interval = (
        dashboard.IntervalVariable("interval")
        .label("Averaged over")
        .description("Time window of every rate: short reacts fast, long is smooth. Use at least four scrapes.")
        .values(",".join(INTERVALS))
        .auto(False)
        .current(_choice(INTERVALS[0], selected=True))
        .options(
            [model.VariableOption(text=each, value=each, selected=each == INTERVALS[0]) for each in INTERVALS]
        )
    )
    return [source, model_name, *([method] if with_method else []), interval]


def _choice(interval: str, *, selected: bool) -> model.VariableOption:
    return model.VariableOption(text=interval, value=interval, selected=selected)


def _label(name: str, label: str, query: str) -> dashboard.QueryVariable:
    everything = model.VariableOption(text=["All"], value=["$__all"], selected=True)
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"qryType": 1, "query": query, "refId": f"variable-{name}"})  # 1: values of a label
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(everything)
    )


if __name__ == "__main__":
    main()
