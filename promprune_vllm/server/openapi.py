"""Our fields in the server's own API document, /openapi.json and /docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from promprune_vllm.server.route_table import POST_ROUTES

if TYPE_CHECKING:
    from fastapi import FastAPI

_SCHEMAS = "#/components/schemas/"


def document(app: FastAPI, fields: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the fields' schemas to the document the app makes of itself.

    Args:
        app: FastAPI makes its document when first asked for it, and keeps it.
        fields: Name -> JSON schema.
    """
    original = app.openapi

    def openapi() -> dict[str, Any]:
        made = original()
        add_fields(made, fields)
        return made

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual has it


def add_fields(made: dict[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the fields to the request schemas of every route that obeys them. Idempotent."""
    schemas: dict[str, Any] = made.get("components", {}).get("schemas", {})
    taking = [schemas[name] for name in request_schemas(made) if "properties" in schemas.get(name, {})]
    for schema in taking:
        for name in fields:
            schema["properties"].setdefault(name, {"$ref": f"{_SCHEMAS}{name}"})
    if taking:
        schemas.update({name: dict(schema) for name, schema in fields.items()})


def request_schemas(made: Mapping[str, Any]) -> list[str]:
    """Return the names of the request schemas in an OpenAPI document that take a budget, in its order."""
    names: dict[str, None] = {}
    for path, methods in made.get("paths", {}).items():
        route = POST_ROUTES.get(path)
        if route is not None and route.effect == "obeys":
            names.update(dict.fromkeys(_body_schemas(methods.get("post", {}))))
    return list(names)


def _body_schemas(operation: Mapping[str, Any]) -> Iterator[str]:
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema = content.get("schema", {})
        for each in (schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())):
            if each.get("$ref", "").startswith(_SCHEMAS):
                yield each["$ref"].removeprefix(_SCHEMAS)
