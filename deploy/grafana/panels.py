"""Builds panels: one function per kind, so that the dashboards only define what is shown."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, YELLOW, ORANGE, RED = "green", "yellow", "orange", "red"
BLUE, PURPLE, GRAY = "blue", "purple", "#8e8e8e"
Series = tuple[str, str]
"""PromQL, and its name in the legend."""


def queries(*series: Series, once: bool = False, form: PromQueryFormat = PromQueryFormat.TIME_SERIES) -> list[Any]:
    """Return one query per series; with ``once``, only for the end of the time range."""
    targets = []
    for letter, (expression, legend) in zip("ABCDEF", series, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(legend).format(form)
        targets.append((target.instant() if once else target.range()).datasource(SOURCE))
    return targets


def threshold_steps(base: str, *steps: tuple[float, str]) -> dashboard.ThresholdsConfig:
    """Return a color for each range of values: ``base``, then one from each step's value."""
    first = model.Threshold(value=None, color=base)
    rest = [model.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps([first, *rest])


def number(
    title: str,
    description: str,
    expression: str,
    unit: str,
    *,
    steps: tuple[tuple[float, str], ...] = (),
    base: str = BLUE,
    width: int = 4,
    decimals: int | None = None,
    empty: str = "nothing yet",
) -> stat.Panel:
    """Return a panel with one large number: the value at the end of the time range."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(queries((expression, ""), once=True))
        .unit(unit)
        .no_value(empty)
        .thresholds(threshold_steps(base, *steps))
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .color_mode(look.BigValueColorMode.VALUE)
        .graph_mode(look.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .height(4)
        .span(width)
    )
    return panel if decimals is None else panel.decimals(decimals)


def lines(
    title: str,
    description: str,
    *series: Series,
    unit: str,
    colors: dict[str, str] | None = None,
    stacked: bool = False,
    width: int = 8,
    share: bool = False,
    right: dict[str, str] | None = None,
    empty: str = "nothing yet",
) -> timeseries.Panel:
    """Return lines over time, or stacked areas; ``right`` gives lines on the right axis their unit."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(queries(*series))
        .unit(unit)
        .no_value(empty)
        .min(0)
        .line_width(1 if stacked else 2)
        .fill_opacity(35 if stacked else 8)
        .gradient_mode(look.GraphGradientMode.OPACITY)
        .show_points(look.VisibilityMode.NEVER)
        .line_interpolation(look.LineInterpolation.LINEAR)
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .legend(_legend())
        .tooltip(common.VizTooltipOptions().mode(look.TooltipDisplayMode.MULTI).sort(look.SortOrder.DESCENDING))
        .height(8)
        .span(width)
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(look.StackingMode.NORMAL).group("A"))
    if share:
        panel = panel.max(1)
    for name in {**(colors or {}), **(right or {})}:
        panel = panel.override_by_name(name, _own(name, colors or {}, right or {}))
    return panel


def _own(name: str, colors: dict[str, str], right: dict[str, str]) -> list[model.DynamicConfigValue]:
    values: dict[str, object] = {}
    if name in colors:
        values["color"] = {"mode": "fixed", "fixedColor": colors[name]}
    if name in right:
        values |= {"unit": right[name], "custom.axisPlacement": "right", "custom.fillOpacity": 0}
    return [model.DynamicConfigValue(id_val=key, value=value) for key, value in values.items()]


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .display_mode(look.LegendDisplayMode.TABLE)
        .placement(look.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )


def cells(
    title: str, description: str, expression: str, *, unit: str, scheme: str = "Turbo", width: int = 12
) -> heatmap.Panel:
    """Return a heatmap of a histogram over time: stronger color means more observations in that bucket."""
    axis = heatmap.YAxisConfig().unit(unit).axis_placement(look.AxisPlacement.LEFT)
    color = (
        heatmap.HeatmapColorOptions()
        .mode(heat.HeatmapColorMode.SCHEME)
        .scheme(scheme)
        .scale(heat.HeatmapColorScale.EXPONENTIAL)
        .exponent(0.5)
        .steps(64)
        .reverse(False)
        .fill("dark-orange")
    )
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(queries((expression, "{{le}}"), form=PromQueryFormat.HEATMAP))
        .unit(unit)
        .calculate(False)
        .y_axis(axis)
        .color(color)
        .cell_gap(1)
        .cell_values(heatmap.CellValues().unit("short").decimals(2))
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .rows_frame(heatmap.RowsHeatmapOptions().layout(look.HeatmapCellLayout.AUTO))
        .show_value(look.VisibilityMode.NEVER)
        .mode(look.TooltipDisplayMode.SINGLE)
        .show_y_histogram()
        .show_color_scale(True)
        .show_legend()
        .exemplars_color("rgba(255,0,255,0.7)")
        .height(8)
        .span(width)
    )


def facts(
    title: str,
    description: str,
    expression: str,
    columns: dict[str, str],
    *,
    width: int,
    height: int = 8,
    nothing: str = "no server with the plugin is being scraped",
) -> table.Panel:
    """Return a table of labels, one row per series."""
    renamed = model.DataTransformerConfig(
        id_val="organize",
        options={
            "excludeByName": {"Time": True, "Value": True},
            "indexByName": {label: position for position, label in enumerate(columns)},
            "renameByName": columns,
        },
    )
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(queries((expression, ""), once=True, form=PromQueryFormat.TABLE))
        .with_transformation(renamed)
        .show_header(True)
        .no_value(nothing)
        .height(height)
        .span(width)
    )
