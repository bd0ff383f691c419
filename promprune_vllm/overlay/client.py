"""Client of a server's ``POST /v1/visual_tokens/inspect``."""

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


class InspectClient:
    """A connection to one server; a context manager.

    Args:
        url: Base address of the server, with or without ``/v1``.
        api_key: API key of the server, if it requires one.
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

    def inspect(
        self,
        file: Path,
        budget: object,
        method: str | None = None,
        text: str | None = None,
        *,
        answer: bool | None = None,
    ) -> dict[str, Any]:
        """Return the reply of ``POST /v1/visual_tokens/inspect`` about a file; the rest are fields.

        Raises:
            InspectError: No server answers, it has no inspector, or it refuses the file or a setting.
        """
        kind = "video" if is_video(file) else "image"
        fields = {kind: _data_url(file), FIELD: budget, METHOD_FIELD: method, "text": text, "answer": answer}
        body = {name: value for name, value in fields.items() if value is not None}
        try:
            response = self._client.post(PATH, json=body)
        except httpx.TransportError as error:
            raise InspectError(
                f"No server answers at {self.url} ({error or type(error).__name__}). Start one, for "
                "example with `promprune demo`, or give another address with --url."
            ) from error
        if response.status_code == httpx.codes.OK:
            reply: dict[str, Any] = response.json()
            return reply
        raise InspectError(f"{file}: {_error_text(response, self.url)}")


def is_video(file: Path) -> bool:
    """Whether a file is a video, by its name."""
    return (mimetypes.guess_type(file.name)[0] or "").startswith("video/")


def _data_url(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InspectError(f"{file} cannot be read: {error.strerror}.") from error
    kind = mimetypes.guess_type(file.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _error_text(response: httpx.Response, url: str) -> str:
    if response.status_code == httpx.codes.NOT_FOUND:
        return (
            f"{url} has no {PATH}. The server runs without promprune-vllm, or was started with --no-inspector "
            "(PROMPRUNE_INSPECTOR=false)."
        )
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"{url} requires an API key: set it with --api-key or OPENAI_API_KEY."
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{url} answered {response.status_code}: {response.text[:300]}"
