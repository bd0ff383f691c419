"""Sends the traffic of ``promprune demo --traffic`` to a server, with the OpenAI SDK, a few requests at a time."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import httpx
from PIL import Image
from rich.table import Table

from promprune_vllm.client import authorization, base_url, counted_tokens
from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.demo import images
from promprune_vllm.demo.traffic import Ask, Line, Picture, Sent, lines, plan, total
from promprune_vllm.errors import DemoError

_LONGEST_SIDE_PX = 448
_TIMEOUT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Traffic:
    """How much to send.

    Args:
        seconds: No request starts later than this.
        concurrency: Requests in flight at any time.
        seed: The same seed sends the same requests, as many of them as the server answers in the time.
    """

    seconds: float
    concurrency: int = 4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What was sent and what came of it."""

    url: str
    model: str
    traffic: Traffic
    seconds: float
    rows: list[Line]
    total: Line

    def as_document(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {**asdict(self), "seconds": round(self.seconds, 2)}

    def as_table(self) -> Table:
        """Return the table for a terminal."""
        title = f"{self.seconds:.0f} s of traffic to {self.model}"
        table = Table(title=title, title_justify="left", show_footer=True)
        every = asdict(self.total)
        table.add_column("budget", footer="all")
        for name in every:
            if name != "kind":
                heading = {"seen": "tokens seen"}.get(name, name)
                table.add_column(heading, justify="right", footer=f"{every[name]:,}")
        for row in self.rows:
            kind, *numbers = asdict(row).values()
            table.add_row(kind, *(f"{number:,}" if number else "" for number in numbers))
        return table


def send(url: str, traffic: Traffic, api_key: str | None = None) -> Report:
    """Send traffic to a server until the time is over.

    Args:
        url: Base address of a server that runs the plugin.
        traffic: How much.
        api_key: The server's, if it asks for one.

    Raises:
        DemoError: There is no such server, it wants another key, or it went away.
    """
    from openai import OpenAI

    url, key = base_url(url), api_key or "none"
    methods = _other_methods(url, key)
    with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=_TIMEOUT_SECONDS) as client:
        model = client.models.list().data[0].id
        asks, guard, over, sent = plan(traffic.seed, methods), threading.Lock(), threading.Event(), list[Sent]()

        def work() -> None:
            try:
                for ask in _taken(asks, guard, over):
                    sent.append(_send(client, model, ask))
            finally:
                over.set()  # when one worker fails, the others need not go on

        started = time.monotonic()
        pool = ThreadPoolExecutor(traffic.concurrency)
        workers = [pool.submit(work) for _ in range(traffic.concurrency)]
        try:
            over.wait(traffic.seconds)
        except BaseException:
            pool.shutdown(wait=False)  # a server that is stopped next ends what is in flight
            raise
        finally:
            over.set()
        pool.shutdown()
        for worker in workers:
            worker.result()
    return Report(url, model, traffic, time.monotonic() - started, lines(sent), total(sent))


def _taken(asks: Iterator[Ask], guard: threading.Lock, over: threading.Event) -> Iterator[Ask]:
    """Yield what no other worker has taken, until it is over."""
    while not over.is_set():
        with guard:
            ask = next(asks)
        yield ask


def _other_methods(url: str, key: str) -> list[str]:
    """Return the methods a request may name beside the server's own; makes sure that it is a server of ours."""
    try:
        reply = httpx.get(f"{url}/v1/visual_tokens", headers=authorization(key), timeout=30)
    except httpx.TransportError as error:
        raise DemoError(f"No server answers at {url}: {error}.") from error
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        raise DemoError(f"{url} wants its API key: give it as --api-key or in OPENAI_API_KEY.")
    if reply.status_code != httpx.codes.OK:
        raise DemoError(f"{url}/v1/visual_tokens is HTTP {reply.status_code}: is promprune-vllm installed there?")
    state = reply.json()
    if not state["prunable"]:
        raise DemoError(f"The model at {url} cannot be pruned: {state['reason']}")
    return [each["name"] for each in state["allowed_methods"] if each["name"] != state["method"]["name"]]


def _send(client: Any, model: str, ask: Ask) -> Sent:
    from openai import APIConnectionError, APIError, APITimeoutError, BadRequestError

    try:
        return _answered(client, model, ask)
    except BadRequestError:
        return Sent(ask.kind, "refused")
    except APIConnectionError as error:
        if isinstance(error, APITimeoutError):
            return Sent(ask.kind, "failed")
        raise DemoError(f"The server at {client.base_url} went away: {error.__cause__ or error}.") from error
    except httpx.TransportError as error:  # in the middle of a stream, where the SDK does not wrap it
        raise DemoError(f"The server at {client.base_url} went away: {error}.") from error
    except APIError:
        return Sent(ask.kind, "failed")


def _answered(client: Any, model: str, ask: Ask) -> Sent:
    extra = {FIELD: ask.budget, METHOD_FIELD: ask.method}
    reply = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": _content(ask)}],
        max_tokens=ask.answer_tokens,
        temperature=0,
        stream=ask.stream,
        extra_body={name: value for name, value in extra.items() if value is not None},
    )
    outcome = "answered"
    if ask.stream:
        with reply.parse() as stream:
            for chunk in stream:
                if ask.abort and chunk.choices and chunk.choices[0].delta.content:
                    outcome = "aborted"
                    break  # closes the connection, as a user does who has read enough
    return Sent(ask.kind, outcome, *counted_tokens(reply.headers))


def _content(ask: Ask) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in ask.pictures]
    return [*parts, {"type": "text", "text": ask.question}]


@lru_cache(maxsize=64)
def _data_url(picture: Picture) -> str:
    image = _pool()[picture.name]
    if picture.box is not None:
        width, height = image.size
        left, top, side = picture.box
        right, bottom = (left + side) * width, (top + side) * height
        image = image.crop((round(left * width), round(top * height), round(right), round(bottom)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


@lru_cache(maxsize=1)
def _pool() -> list[Image.Image]:
    """Return the demo's photographs, quarters of them and made images, none larger than a small photograph."""
    pool = [image.copy() for image in (*images.photographs().values(), *images.made().values())]
    for image in pool:
        image.thumbnail((_LONGEST_SIDE_PX, _LONGEST_SIDE_PX))
    return pool
