"""Sends the traffic of ``promprune demo --traffic`` to a server with the OpenAI SDK, a few requests at a time."""

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

from promprune_vllm.client import authorization, base_url, counted_tokens, was_asked_again
from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.demo import images
from promprune_vllm.demo.traffic import Line, Picture, Request, Result, lines, plan, total
from promprune_vllm.errors import DemoError

_LONGEST_SIDE_PX = 448
_TIMEOUT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Traffic:
    """How much to send.

    Args:
        seconds: Duration; no request starts later.
        concurrency: Requests in flight at any time.
        seed: Random seed; the same seed sends the same requests, as many as the server answers in time.
    """

    seconds: float
    concurrency: int = 4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Results of the traffic."""

    url: str
    model: str
    traffic: Traffic
    seconds: float
    rows: list[Line]
    total: Line

    def as_document(self) -> dict[str, Any]:
        """Return all results, ready for JSON."""
        return {**asdict(self), "seconds": round(self.seconds, 2)}

    def as_table(self) -> Table:
        """Return the results as a table for the terminal."""
        title = f"{self.seconds:.0f} s of traffic to {self.model}"
        table = Table(title=title, title_justify="left", show_footer=True)
        every = asdict(self.total)
        table.add_column("budget", footer="all")
        for name in every:
            if name != "kind":
                heading = {"seen": "tokens seen", "asked_again": "asked again"}.get(name, name)
                table.add_column(heading, justify="right", footer=f"{every[name]:,}")
        for row in self.rows:
            kind, *numbers = asdict(row).values()
            table.add_row(kind, *(f"{number:,}" if number else "" for number in numbers))
        return table


def send(url: str, traffic: Traffic, api_key: str | None = None) -> Report:
    """Send traffic to a server until the time is up.

    Args:
        url: Base address of a server that runs the plugin.
        traffic: How much to send.
        api_key: API key of the server, if it requires one.

    Raises:
        DemoError: No such server answers, it rejects the key, or it went away.
    """
    from openai import OpenAI

    url, key = base_url(url), api_key or "none"
    methods = _other_methods(url, key)
    with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=_TIMEOUT_SECONDS) as client:
        model = client.models.list().data[0].id
        requests, sent = plan(traffic.seed, methods), list[Result]()
        guard, over = threading.Lock(), threading.Event()

        def work() -> None:
            try:
                for request in _take(requests, guard, over):
                    sent.append(_send(client, model, request))
            finally:
                over.set()  # if one worker fails, the others stop too

        started = time.monotonic()
        pool = ThreadPoolExecutor(traffic.concurrency)
        workers = [pool.submit(work) for _ in range(traffic.concurrency)]
        try:
            over.wait(traffic.seconds)
        except BaseException:
            pool.shutdown(wait=False)  # the caller stops the server, which ends the requests in flight
            raise
        finally:
            over.set()
        pool.shutdown()
        for worker in workers:
            worker.result()
    return Report(url, model, traffic, time.monotonic() - started, lines(sent), total(sent))


def _take(requests: Iterator[Request], guard: threading.Lock, over: threading.Event) -> Iterator[Request]:
    """Yield requests that no other worker has taken, until ``over`` is set."""
    while not over.is_set():
        with guard:
            request = next(requests)
        yield request


def _other_methods(url: str, key: str) -> list[str]:
    """Return the methods that may prune an image besides the default; check that the server runs the plugin."""
    try:
        reply = httpx.get(f"{url}/v1/visual_tokens", headers=authorization(key), timeout=30)
    except httpx.TransportError as error:
        raise DemoError(f"No server answers at {url}: {error}.") from error
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        raise DemoError(f"{url} requires an API key: set it with --api-key or OPENAI_API_KEY.")
    if reply.status_code != httpx.codes.OK:
        raise DemoError(f"{url}/v1/visual_tokens answered {reply.status_code}: is promprune-vllm installed there?")
    state = reply.json()
    if not state["prunable"]:
        raise DemoError(f"The model at {url} cannot be pruned: {state['reason']}")
    names = [each["name"] for each in state["allowed_methods"] if not each.get("over_frames")]
    return [name for name in names if name != state["method"]["name"]]


def _send(client: Any, model: str, request: Request) -> Result:
    from openai import APIConnectionError, APIError, APITimeoutError, BadRequestError

    try:
        return _post(client, model, request)
    except BadRequestError:
        return Result(request.kind, "refused")
    except APIConnectionError as error:
        if isinstance(error, APITimeoutError):
            return Result(request.kind, "failed")
        raise DemoError(f"The server at {client.base_url} went away: {error.__cause__ or error}.") from error
    except httpx.TransportError as error:  # during a stream, where the SDK does not wrap it
        raise DemoError(f"The server at {client.base_url} went away: {error}.") from error
    except APIError:
        return Result(request.kind, "failed")


def _post(client: Any, model: str, request: Request) -> Result:
    extra = {FIELD: request.budget, METHOD_FIELD: request.method, ESCALATE_FIELD: request.escalate}
    reply = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": _content(request)}],
        max_tokens=request.answer_tokens,
        temperature=0,
        stream=request.stream,
        extra_body={name: value for name, value in extra.items() if value is not None},
    )
    outcome, again = "answered", False
    if not request.stream:
        again = was_asked_again(reply.parse().usage.model_dump())
    else:
        with reply.parse() as stream:
            for chunk in stream:
                if request.abort and chunk.choices and chunk.choices[0].delta.content:
                    outcome = "aborted"
                    break  # closes the connection, like a user who has read enough
    return Result(request.kind, outcome, *counted_tokens(reply.headers), again)


def _content(request: Request) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in request.pictures]
    return [*parts, {"type": "text", "text": request.question}]


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
    """Return the demo's photographs, their quarters and synthetic images, all scaled down."""
    pool = [image.copy() for image in (*images.photographs().values(), *images.synthetic().values())]
    for image in pool:
        image.thumbnail((_LONGEST_SIDE_PX, _LONGEST_SIDE_PX))
    return pool
