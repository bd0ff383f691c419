"""``promprune metrics``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from promprune_vllm.markdown import table


def metrics(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables of docs/metrics.md.")] = False,
) -> None:
    """List the Prometheus metrics that the plugin adds to vLLM's /metrics, with types and labels."""
    if as_markdown:
        typer.echo(markdown())
    elif as_json:
        typer.echo(json.dumps(describe(), indent=2))
    else:
        _show()


def describe() -> list[dict[str, Any]]:
    """Describe every metric as plain data."""
    from promprune_vllm.metrics.catalog import CATALOG

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


def markdown() -> str:
    """Render the tables of metrics and of their labels in docs/metrics.md."""
    rows = [
        (f"`{row['name']}`", row["type"], ", ".join(f"`{name}`" for name in row["labels"]), row["help"])
        for row in describe()
    ]
    explained = [(f"`{name}`", text) for name, text in _labels().items()]
    metrics_table = table(("metric", "type", "labels", "what it measures"), rows)
    return f"{metrics_table}\n\n{table(('label', 'meaning'), explained)}"


def _labels() -> dict[str, str]:
    """Return what each label means, with the values it can take."""
    from promprune_vllm.metrics.metric import LABELS

    return {name: f"{text}: {', '.join(values)}" if values else text for name, (text, values) in LABELS.items()}


def _show() -> None:
    for row in describe():
        typer.secho(f"{row['name']}{{{', '.join(row['labels'])}}} {row['type']}", bold=True)
        typer.echo(f"  {row['help']}")
    typer.echo("\nLabels")
    for name, text in _labels().items():
        typer.echo(f"  {name}: {text}")
