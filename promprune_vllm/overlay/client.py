"""Asks a running server what it keeps of an image."""

from __future__ import annotations

import base64
import mimetypes
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from promprune_vllm.client import authorization, base_url
from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.errors import InspectError

PATH = "/v1/visual_tokens/inspect"
_TIMEOUT_SECONDS = 300


class Inspecting:
    """A connection to one server; a context manager.

    Args:
        url: Its base address, with or without ``/v1``.
        api_key: The server's, if it asks for one.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = base_url(url)
        self._client = httpx.Client(base_url=self.url, headers=authorization(api_key), timeout=_TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def look(
        self, image: Path, budget: object, method: str | None = None, text: str | None = None
    ) -> dict[str, Any]:
        """Return the reply of ``POST /v1/visual_tokens/inspect``.

        Raises:
            InspectError: Nobody answers, the server cannot inspect, or it refuses the image or the setting.
        """
        asked = {"image": _data_url(image), FIELD: budget, METHOD_FIELD: method, "text": text}
        body = {name: value for name, value in asked.items() if value is not None}
        try:
            response = self._client.post(PATH, json=body)
        except httpx.TransportError as error:
            raise InspectError(
                f"Nobody answers at {self.url} ({error or type(error).__name__}). Start a server, for "
                "example with `promprune demo`, or give another address with --url."
            ) from error
        if response.status_code == httpx.codes.OK:
            told: dict[str, Any] = response.json()
            return told
        raise InspectError(f"{image}: {_said(response, self.url)}")


def _data_url(image: Path) -> str:
    try:
        content = image.read_bytes()
    except OSError as error:
        raise InspectError(f"{image} cannot be read: {error.strerror}.") from error
    kind = mimetypes.guess_type(image.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _said(response: httpx.Response, url: str) -> str:
    if response.status_code == httpx.codes.NOT_FOUND:
        return (
            f"{url} has no {PATH}. It runs without promprune-vllm, or was started with --no-inspector "
            "(PROMPRUNE_INSPECTOR=false)."
        )
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"{url} asks for its API key: give it with --api-key or as OPENAI_API_KEY."
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{url} answered {response.status_code}: {response.text[:300]}"
