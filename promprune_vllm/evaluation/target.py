"""The server that is asked: whether it runs the plugin, what it serves and which methods it allows."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from promprune_vllm.client import authorization, base_url
from promprune_vllm.errors import EvaluationError

STATE_PATH = "/v1/visual_tokens"
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers and runs the plugin.

    Args:
        url: Base address, without ``/v1`` and without a slash at the end.
        model: Name that requests give.
        api_key: The server's, if it asks for one.
        state: What its ``GET /v1/visual_tokens`` says.
    """

    url: str
    model: str
    api_key: str | None
    state: Mapping[str, Any]

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return authorization(self.api_key)

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The methods a request may choose, with the options in force."""
        return {each["name"]: each["options"] for each in self.state["allowed_methods"]}

    def settings(self) -> dict[str, Any]:
        """Everything of the server that decides what a question is answered with."""
        names = ("version", "vllm_version", "model", "architecture")
        return {"server": {name: self.state[name] for name in names}, "methods": self.methods}

    def require(self, methods: Sequence[str]) -> None:
        """Refuse methods that a request cannot choose here.

        Raises:
            EvaluationError: Names what it allows, and how to allow more.
        """
        missing = [name for name in methods if name not in self.methods]
        if missing:
            raise EvaluationError(
                f"The server at {self.url} does not allow method {', '.join(map(repr, missing))}, only "
                f"{', '.join(self.methods)}: start it with --visual-token-allow-methods {','.join(missing)}, "
                "or give others with --methods."
            )


def look(url: str, model: str | None = None, api_key: str | None = None) -> Target:
    """Look at a server before anything is asked.

    Args:
        url: Its address, with or without ``/v1``.
        model: Name of the model; the first it serves by default.
        api_key: The server's, if it asks for one.

    Raises:
        EvaluationError: Nobody answers, the plugin is not there, or the model is not served or cannot be pruned.
    """
    url = base_url(url)
    none = (
        f"{url} serves without promprune-vllm: it has no {STATE_PATH}. "
        "Install the plugin beside its vLLM and start it again, for example with `promprune serve`."
    )
    with httpx.Client(headers=authorization(api_key), timeout=_TIMEOUT_SECONDS, verify=trusted()) as client:
        state = _get(client, url, STATE_PATH, missing=none)
        served = [each["id"] for each in _get(client, url, "/v1/models")["data"]]
    if model is not None and model not in served:
        raise EvaluationError(f"{url} serves no model {model!r}, only {', '.join(served)}: give one with --model.")
    if not state["prunable"]:
        raise EvaluationError(
            f"The model at {url} cannot be pruned ({state['reason']}): serve one of `promprune families`."
        )
    return Target(url, model or served[0], api_key, state)


@functools.cache
def trusted() -> ssl.SSLContext:
    """Who is trusted over HTTPS. Every client would read the list of authorities anew, which takes 30 ms."""
    return httpx.create_ssl_context()


def _get(client: httpx.Client, url: str, path: str, missing: str | None = None) -> Any:
    try:
        reply = client.get(f"{url}{path}")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EvaluationError(
            f"Nothing answers at {url} ({error}): start a server with `promprune serve`, or correct --url."
        ) from error
    if reply.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise EvaluationError(f"{url} wants another API key: give it with --api-key or OPENAI_API_KEY.")
    try:
        if reply.status_code == httpx.codes.OK:
            return reply.json()
    except ValueError:
        pass
    raise EvaluationError(
        missing or f"{url}{path} answers with status {reply.status_code}: is it an OpenAI server?"
    )
