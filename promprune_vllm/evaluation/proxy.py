"""A proxy on the loopback interface that adds our fields to every chat request and forwards it.

It lets clients that cannot add request fields, such as lmms-eval, send a budget.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from promprune_vllm.client import counted_tokens
from promprune_vllm.evaluation.target import Target, tls_context

CHAT = "/v1/chat/completions"
_TIMEOUT_SECONDS = 600


@dataclass(slots=True)
class Tally:
    """Counts of the forwarded chat requests.

    Args:
        answered: Chat requests that the server answered.
        refused: Chat requests that it did not answer.
        last_refusal: Status and text of the last of these.
        seen: Visual tokens of all images.
        kept: Visual tokens that entered the language model.
    """

    answered: int = 0
    refused: int = 0
    last_refusal: str = ""
    seen: int = 0
    kept: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, reply: httpx.Response) -> None:
        """Count one reply to a chat request."""
        with self._lock:
            if reply.status_code != httpx.codes.OK:
                self.refused += 1
                self.last_refusal = f"status {reply.status_code}: {reply.text[:500]}"
                return
            self.answered += 1
            seen, kept = counted_tokens(reply.headers)
            self.seen += seen
            self.kept += kept


@contextmanager
def proxy(target: Target, fields: Mapping[str, Any]) -> Iterator[tuple[str, str, Tally]]:
    """Forward requests inside the block.

    Args:
        target: The server to forward to, with its API key.
        fields: Fields added to the body of every chat request.

    Yields:
        The address to use instead of the server's, without ``/v1``; an API key for it, so that no one else on this
        machine can use the server's key; and the counts.
    """
    tally, key = Tally(), secrets.token_hex(16)
    limits = httpx.Limits(
        max_connections=None, keepalive_expiry=2
    )  # close idle connections before the server does, which would be an error
    with httpx.Client(
        headers=target.headers, timeout=_TIMEOUT_SECONDS, limits=limits, verify=tls_context()
    ) as client:

        def ask(method: str, path: str, body: bytes | None) -> httpx.Response:
            if path == CHAT and body is not None:
                body = json.dumps({**json.loads(body), **fields}).encode()
            try:
                kind = {"Content-Type": "application/json"}
                reply = client.request(method, f"{target.url}{path}", content=body, headers=kind)
            except httpx.HTTPError as error:
                reply = httpx.Response(502, json={"error": {"message": f"{target.url} went away: {error}"}})
            if path == CHAT:
                tally.count(reply)
            return reply

        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(ask, key))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", key, tally
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(ask: Callable[[str, str, bytes | None], httpx.Response], key: str) -> type[BaseHTTPRequestHandler]:
    """Return the request handler, given a function that sends a request to the server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._hand_on(None)

        def do_POST(self) -> None:
            self._hand_on(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def _hand_on(self, body: bytes | None) -> None:
            if self.headers.get("Authorization") != f"Bearer {key}":
                self.send_error(401)
                return
            reply = ask(self.command, self.path, body)
            self.send_response(reply.status_code)
            self.send_header("Content-Type", reply.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        def log_message(self, *_: object) -> None:
            """Log nothing: the tally counts."""

    return Handler
