"""The PromQL that panels of both dashboards are built from."""

from __future__ import annotations

OF_MODEL = 'model_name=~"$model"'
KEPT, SEEN, SAVED = (f"promprune_visual_tokens_{what}_total" for what in ("kept", "seen", "saved"))
WAIT = "promprune_first_token_seconds"


def in_range(name: str, **labels: str) -> str:
    """Return the PromQL for a counter's increase over the dashboard's time range."""
    return f"sum(increase({name}{{{_matchers(labels)}}}[$__range]))"


def per_second(name: str, by: str = "", **labels: str) -> str:
    """Return the PromQL for a counter's rate per second."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({name}{{{_matchers(labels)}}}[$interval]))"


def quantile(q: float, name: str, by: str = "", **labels: str) -> str:
    """Return the PromQL for a quantile of a histogram."""
    le = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({le}) (rate({name}_bucket{{{_matchers(labels)}}}[$interval])))"


def mean(name: str, **labels: str) -> str:
    """Return the PromQL for the mean of a histogram over the dashboard's time range."""
    total, count = (in_range(f"{name}_{part}", **labels) for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def running_mean(name: str, by: str, **labels: str) -> str:
    """Return the PromQL for the mean of a histogram over time."""
    total, count = (per_second(f"{name}_{part}", by, **labels) for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def buckets(name: str, **labels: str) -> str:
    """Return the PromQL for a heatmap of a histogram."""
    return per_second(f"{name}_bucket", "le", **labels)


def _matchers(labels: dict[str, str]) -> str:
    return ", ".join([OF_MODEL, *(f'{name}=~"{values}"' for name, values in labels.items())])
