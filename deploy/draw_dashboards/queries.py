"""Asks Prometheus what Grafana would ask it for a dashboard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

_TIMEOUT_SECONDS = 60
_POINTS = 240
"""Of a line at most; Grafana has about one for every few pixels."""


class DrawError(Exception):
    """A dashboard cannot be drawn; the message says why."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a query over time.

    Args:
        labels: Its labels.
        points: Seconds since 1970 -> value; numbers that are not finite are left out.
    """

    labels: Mapping[str, str]
    points: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A range of time in a Prometheus.

    Args:
        url: Its address.
        start, end: Seconds since 1970.
    """

    url: str
    start: float
    end: float

    @property
    def step(self) -> float:
        """Seconds between two points of a line."""
        return max(1.0, math.ceil((self.end - self.start) / _POINTS))

    def over_time(self, expression: str) -> list[Line]:
        """Return the series of a query over the range."""
        span = {"start": str(self.start), "end": str(self.end), "step": str(self.step)}
        found = self._get("query_range", query=expression, **span)["result"]
        return [
            Line(series["metric"], {at: float(value) for at, value in series["values"] if _is_finite(value)})
            for series in found
        ]

    def at_the_end(self, expression: str) -> list[tuple[Mapping[str, str], float]]:
        """Return labels and value of each series of a query at the end of the range, if finite."""
        found = self._get("query", query=expression, time=str(self.end))["result"]
        return [(each["metric"], float(each["value"][1])) for each in found if _is_finite(each["value"][1])]

    def variables(self, document: Mapping[str, Any]) -> dict[str, str]:
        """Return what Grafana would put in the place of each variable of a dashboard, everything being chosen."""
        values = {"$__range": f"{math.ceil(self.end - self.start)}s"}
        for variable in document["templating"]["list"]:
            name = f"${variable['name']}"
            if variable["type"] == "interval":
                values[name] = variable["current"]["value"]
            elif variable["type"] == "query":
                known = self._label_values(variable["query"]["query"], values)
                values[name] = variable.get("allValue") or f"({'|'.join(known)})"
        return values

    def _label_values(self, query: str, values: Mapping[str, str]) -> list[str]:
        selector, _, label = query.removeprefix("label_values(").removesuffix(")").rpartition(", ")
        found: list[str] = self._get(f"label/{label}/values", **{"match[]": filled(selector, values)})
        return found

    def _get(self, path: str, **query: str) -> Any:
        try:
            reply = httpx.get(f"{self.url}/api/v1/{path}", params=query, timeout=_TIMEOUT_SECONDS)
            document = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise DrawError(f"No Prometheus answers at {self.url} ({error or type(error).__name__}).") from error
        if document.get("status") != "success":
            raise DrawError(f"Prometheus refuses {query.get('query', path)}: {document.get('error')}")
        return document["data"]


def filled(expression: str, values: Mapping[str, str]) -> str:
    """Return an expression with the values of its variables."""
    for name in sorted(values, key=len, reverse=True):
        expression = expression.replace(name, values[name])
    if "$" in expression:
        raise DrawError(f"a variable has no value in {expression}")
    return expression


def _is_finite(value: str) -> bool:
    return math.isfinite(float(value))
