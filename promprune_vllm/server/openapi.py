"""Adds our request fields to the server's OpenAPI document: /openapi.json and /docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from promprune_vllm.core.budget import FIELD
from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.server.route_table import POST_ROUTES

if TYPE_CHECKING:
    from fastapi import FastAPI

_SCHEMAS = "#/components/schemas/"


def document(app: FastAPI, fields: Mapping[str, Mapping[str, Any]]) -> None:
    """Add our fields' schemas to the app's OpenAPI document.

    Args:
        app: FastAPI builds its document on the first request for it, and keeps it.
        fields: Name -> JSON schema.
    """
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        add_fields(schema, fields)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual does it


def add_fields(openapi: dict[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> None:
    """Add each field to the request schemas of every route that obeys it. Idempotent."""
    schemas: dict[str, Any] = openapi.get("components", {}).get("schemas", {})
    for name, schema in fields.items():
        requests = [
            schemas[each] for each in request_schemas(openapi, name) if "properties" in schemas.get(each, {})
        ]
        for request in requests:
            request["properties"].setdefault(name, {"$ref": f"{_SCHEMAS}{name}"})
        if requests:
            schemas[name] = dict(schema)


def request_schemas(openapi: Mapping[str, Any], field: str = FIELD) -> list[str]:
    """Return the names of an OpenAPI document's request schemas of routes that obey a field, in document order.

    Routes may share a schema: it then has what any of them obeys.
    """
    names: dict[str, None] = {}
    for path, methods in openapi.get("paths", {}).items():
        route = POST_ROUTES.get(path)
        if route is not None and route.effect == "obeys" and (route.asks_again or field != ESCALATE_FIELD):
            names.update(dict.fromkeys(_body_schemas(methods.get("post", {}))))
    return list(names)


def _body_schemas(operation: Mapping[str, Any]) -> Iterator[str]:
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema = content.get("schema", {})
        for each in (schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())):
            if each.get("$ref", "").startswith(_SCHEMAS):
                yield each["$ref"].removeprefix(_SCHEMAS)
