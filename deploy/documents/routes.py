"""The tables in docs/requests.md of what our fields do on every route and in every offline entry point."""

from __future__ import annotations

from collections.abc import Mapping

from promprune_vllm.markdown import table
from promprune_vllm.server.route_table import OFFLINE, POST_ROUTES, Route

_COLUMNS = ("effect of a budget", "`visual_token_escalate`", "")


def markdown() -> str:
    """Render both tables."""
    routes = {path: route for path, route in POST_ROUTES.items() if _shown(route)}
    tables = (("route", routes), ("offline", OFFLINE))
    return "\n\n".join(table((what, *_COLUMNS), _rows(entries)) for what, entries in tables)


def _rows(entries: Mapping[str, Route]) -> list[tuple[str, ...]]:
    return [
        (f"`{name}`", route.effect, "taken" if route.asks_again else "refused", route.note)
        for name, route in entries.items()
    ]


def _shown(route: Route) -> bool:
    return route.effect != "no image" or bool(route.note)
