"""Reads our fields of an HTTP request from the JSON that the client sent.

Some of vLLM's request schemas drop unknown fields (Anthropic's, and that of ``/inference/v1/generate``). So every
route gets one more FastAPI dependency, which reads the decoded body before any schema does. Starlette keeps the
decoded body with the request, so nothing is parsed twice.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from fastapi import Depends, Request
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.routing import APIRoute

from promprune_vllm.engine.api_server import pruning_request, request_fields

if TYPE_CHECKING:
    from fastapi import FastAPI


def attach(app: FastAPI) -> None:
    """Read our fields on every route that the app has so far. Our own routes, added later, check theirs."""
    for route in app.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods:
            dependency = Depends(_reader(route.path))
            dependant = get_parameterless_sub_dependant(depends=dependency, path=route.path_format)
            route.dependant.dependencies.insert(0, dependant)  # APIRoute adds dependencies the same way


def _reader(path: str) -> Callable[[Request], Awaitable[None]]:
    async def read_fields(request: Request) -> None:
        body = await _decode_body(request)
        if isinstance(body, Mapping):
            request_fields.remember_http_fields(body)
            pruning_request.remember_admitted(request.app.state.visual_tokens.check_fields(body, path))

    return read_fields


async def _decode_body(request: Request) -> object:
    """Return the decoded body, or ``None`` if it is not JSON: vLLM refuses such a body itself."""
    if "json" not in request.headers.get("content-type", "").lower():
        return None
    try:
        return await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None
