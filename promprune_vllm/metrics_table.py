"""The metrics catalogue as the command line and docs/metrics.md show it."""

from __future__ import annotations

from typing import Any

from promprune_vllm.markdown import table
from promprune_vllm.metrics.catalog import CATALOG, LABELS


def describe() -> list[dict[str, Any]]:
    """Every metric as plain data."""
    return [
        {
            "name": metric.name,
            "type": metric.kind,
            "labels": list(metric.labels),
            "help": metric.help,
            "buckets": list(metric.buckets),
        }
        for metric in CATALOG
    ]


def labels() -> dict[str, str]:
    """What each label says, with the values it can take."""
    return {name: f"{text}: {', '.join(known)}" if known else text for name, (text, known) in LABELS.items()}


def markdown() -> str:
    """Render the tables of metrics and of their labels in docs/metrics.md."""
    rows = [
        (f"`{row['name']}`", row["type"], ", ".join(f"`{name}`" for name in row["labels"]), row["help"])
        for row in describe()
    ]
    explained = [(f"`{name}`", text) for name, text in labels().items()]
    return f"{table(('metric', 'type', 'labels', 'what it tells'), rows)}\n\n{table(('label', 'says'), explained)}"
