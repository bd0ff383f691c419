"""The server to ask: checks that it runs the plugin, and reads its model and allowed methods."""

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
    """A reachable server that runs the plugin.

    Args:
        url: Base address, without ``/v1`` and without a trailing slash.
        model: Model name for requests.
        api_key: API key of the server, if it requires one.
        state: Reply of its ``GET /v1/visual_tokens``.
    """

    url: str
    model: str
    api_key: str | None
    state: Mapping[str, Any]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return authorization(self.api_key)

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The methods that a request may select, with the options in force."""
        return {each["name"]: each["options"] for each in self.state["allowed_methods"]}

    @property
    def image_methods(self) -> list[str]:
        """The methods that a request with an image may select."""
        return [each["name"] for each in self.state["allowed_methods"] if not each.get("over_frames")]

    def settings(self) -> dict[str, Any]:
        """Everything about the server that influences the answers."""
        names = ("version", "vllm_version", "model", "architecture")
        return {"server": {name: self.state[name] for name in names}, "methods": self.methods}

    def require(self, methods: Sequence[str]) -> None:
        """Check that requests with an image may select these methods.

        Raises:
            EvaluationError: One is not allowed, or compares the frames of a video; says which can be selected.
        """
        from promprune_vllm.core.registry import methods as registered

        usable = self.image_methods
        for_videos = (self.methods.keys() | registered(over_frames=True).keys()) - {*usable}
        videos = [name for name in methods if name in for_videos]
        if videos:
            raise EvaluationError(
                f"Method {', '.join(map(repr, videos))} compares the frames of a video, but the questions are "
                f"about images: leave it out of --methods. Methods for images: {', '.join(usable)}."
            )
        missing = [name for name in methods if name not in usable]
        if missing:
            raise EvaluationError(
                f"The server at {self.url} does not allow method {', '.join(map(repr, missing))}, only "
                f"{', '.join(usable)}: start it with --visual-token-allow-methods {','.join(missing)}, "
                "or pass other methods with --methods."
            )


def find_target(url: str, model: str | None = None, api_key: str | None = None) -> Target:
    """Check a server before anything is asked.

    Args:
        url: Address of the server, with or without ``/v1``.
        model: Model name; the server's first model by default.
        api_key: API key of the server, if it requires one.

    Raises:
        EvaluationError: No server answers, it does not run the plugin, or the model is not served or not prunable.
    """
    url = base_url(url)
    none = (
        f"{url} serves without promprune-vllm: it has no {STATE_PATH}. "
        "Install the plugin next to its vLLM and restart it, for example with `promprune serve`."
    )
    with httpx.Client(headers=authorization(api_key), timeout=_TIMEOUT_SECONDS, verify=tls_context()) as client:
        state = _get(client, url, STATE_PATH, missing=none)
        served = [each["id"] for each in _get(client, url, "/v1/models")["data"]]
    if model is not None and model not in served:
        raise EvaluationError(f"{url} serves no model {model!r}, only {', '.join(served)}: choose with --model.")
    if not state["prunable"]:
        raise EvaluationError(
            f"The model at {url} cannot be pruned ({state['reason']}): serve one from `promprune families`."
        )
    return Target(url, model or served[0], api_key, state)


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Return the shared TLS context: otherwise each client would reload the tls_context CAs, which takes 30 ms."""
    return httpx.create_ssl_context()


def _get(client: httpx.Client, url: str, path: str, missing: str | None = None) -> Any:
    try:
        reply = client.get(f"{url}{path}")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EvaluationError(
            f"No server answers at {url} ({error}): start one with `promprune serve`, or correct --url."
        ) from error
    if reply.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise EvaluationError(f"{url} rejects the API key: set it with --api-key or OPENAI_API_KEY.")
    try:
        if reply.status_code == httpx.codes.OK:
            return reply.json()
    except ValueError:
        pass
    raise EvaluationError(
        missing or f"{url}{path} answered with status {reply.status_code}: is it an OpenAI-compatible server?"
    )
