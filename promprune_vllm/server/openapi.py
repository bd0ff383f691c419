"""Our fields in the server's own API document, /openapi.json and /docs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

REQUESTS = (
    "BatchChatCompletionRequest",
    "ChatCompletionRequest",
    "CompletionRequest",
    "ResponsesRequest",
    "TokenizeChatRequest",
    "TokenizeCompletionRequest",
)
"""Request schemas that take our fields at their top level; a server may have only some of them."""


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
    """Add the fields to every request schema of an OpenAPI document that takes them. Idempotent."""
    schemas: dict[str, Any] = made.get("components", {}).get("schemas", {})
    for request in REQUESTS:
        if request in schemas:
            schemas[request].setdefault("properties", {}).update(
                {name: {"$ref": f"#/components/schemas/{name}"} for name in fields}
            )
    if any(request in schemas for request in REQUESTS):
        schemas.update({name: dict(schema) for name, schema in fields.items()})
