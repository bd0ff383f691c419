"""Sends each request to stock vLLM without our fields, and to ours without and with them; and judges the three."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from promprune_vllm.demo.server import Server
from tests.server.fuzz_made import Drawn

SENDERS = 6
HUNG_SECONDS = 120.0
_OURS = "/v1/visual_tokens"
# Behind an answer of 5xx the server hangs up, and a request that is on its way by then is lost.
_LIMITS = httpx.Limits(max_keepalive_connections=0)
# The last two are vLLM's gate, before which nothing that stands in them is ours.
_EXPLAINS = re.compile("visual_token|visual token|budget|mm_processor_kwargs|media_io_kwargs")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said.

    Args:
        status: Of HTTP, or of the error that a stream ends with; 0 where the server hung, 1 where it hung up.
        text: The answer.
    """

    status: int
    text: str

    @property
    def bad(self) -> bool:
        """Whether this is the server's fault."""
        return self.status < 200 or self.status >= 500


@dataclass(frozen=True, slots=True)
class Judged:
    """One request and its three answers."""

    drawn: Drawn
    stock: Answer | None
    without: Answer
    with_fields: Answer

    def faults(self) -> list[str]:
        """Say what of ours is wrong."""
        if self.stock is None:
            answers = (self.without, self.with_fields)
            # An image may leave a full cache before it was looked at; the reply says so.
            bad = [each for each in answers if each.bad and not (each.status == 503 and "Try again" in each.text)]
            return ["5xx of a route of ours"] if bad else []
        if self.stock.bad:  # not always by the request alone: stock loses an image that came with a refused one
            return []
        found = []
        if self.without.bad or self.with_fields.bad:
            found.append("5xx")
        if self.without.status != self.stock.status:
            found.append("another status than stock's without our fields")
        if self.stock.status == 200 and self.with_fields.status != 200:
            explained = self.with_fields.status == 400 and _EXPLAINS.search(self.with_fields.text)
            if not explained:
                found.append("neither obeyed nor refused with a word on why")
        return found

    def shown(self) -> str:
        """Return everything it takes to send it again."""
        stock = "-" if self.stock is None else f"{self.stock.status} {self.stock.text:.300}"
        return (
            f"{', '.join(self.faults())}: POST {self.drawn.path}\n  body {json.dumps(self.drawn.ours)}\n"
            f"  stock {stock}\n  without {self.without.status} {self.without.text:.300}\n"
            f"  with {self.with_fields.status} {self.with_fields.text:.300}"
        )


def _status(response: httpx.Response) -> int:
    """Return the status that counts: a stream starts with 200 and may end with an error."""
    if response.status_code == 200 and "event-stream" in response.headers.get("content-type", ""):
        for line in response.text.splitlines():
            if line.startswith("data: {") and '"error"' in line:
                error = json.loads(line.removeprefix("data: ")).get("error")
                if isinstance(error, dict):
                    code = error.get("code")
                    return code if isinstance(code, int) else 500
    return response.status_code


class Judge:
    """Sends and compares.

    Args:
        ours: A server with the plugin.
        stock: The same without.
    """

    def __init__(self, ours: Server, stock: Server) -> None:
        self._ours, self._stock = ours.url, stock.url
        self._local = threading.local()

    def all(self, drawn: Sequence[Drawn]) -> list[Judged]:
        """Send all requests, some of them at once."""
        with ThreadPoolExecutor(SENDERS) as pool:
            return list(pool.map(self.one, drawn))

    def one(self, drawn: Drawn) -> Judged:
        """Send one request to both servers."""
        stock = None if drawn.path.startswith(_OURS) else self._send(self._stock, drawn.path, drawn.plain)
        without = self._send(self._ours, drawn.path, drawn.plain)
        return Judged(drawn, stock, without, self._send(self._ours, drawn.path, drawn.ours))

    def _send(self, url: str, path: str, body: Any) -> Answer:
        if not hasattr(self._local, "client"):
            self._local.client = httpx.Client(timeout=HUNG_SECONDS, limits=_LIMITS)
        try:
            # Python's own JSON, which knows halves of surrogate pairs and numbers that are none.
            response = self._local.client.post(
                url + path, content=json.dumps(body), headers={"content-type": "application/json"}
            )
            return Answer(_status(response), response.text)
        except httpx.TimeoutException:
            return Answer(0, f"no answer within {HUNG_SECONDS:.0f} s")
        except httpx.TransportError as error:
            return Answer(1, repr(error))


def table(judged: Sequence[Judged]) -> str:
    """Return how many requests got which status, by route: stock's, ours without our fields and with them."""
    lines = []
    for path in sorted({each.drawn.path for each in judged}):
        of_path = [each for each in judged if each.drawn.path == path]
        columns = [
            Counter(each.stock.status for each in of_path if each.stock),
            Counter(each.without.status for each in of_path),
            Counter(each.with_fields.status for each in of_path),
        ]
        told = (" ".join(f"{status}:{number}" for status, number in sorted(column.items())) for column in columns)
        lines.append(f"{path:34} {len(of_path):5}  " + "  ".join(f"{each:32}" for each in told))
    return "\n".join(lines)
