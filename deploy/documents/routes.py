"""The tables in docs/requests.md of what a budget does on every route and in every offline entry point."""

from __future__ import annotations

from promprune_vllm.markdown import table
from promprune_vllm.server.route_table import OFFLINE, POST_ROUTES, Route


def markdown() -> str:
    """Render both tables."""
    routes = [(f"`{path}`", route.effect, route.note) for path, route in POST_ROUTES.items() if _shown(route)]
    offline = [(f"`{name}`", route.effect, route.note) for name, route in OFFLINE.items()]
    tables = (("route", routes), ("offline", offline))
    return "\n\n".join(table((what, "effect of a budget", ""), rows) for what, rows in tables)


def _shown(route: Route) -> bool:
    return route.effect != "no image" or bool(route.note)
