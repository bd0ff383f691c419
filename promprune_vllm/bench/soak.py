"""``promprune bench soak``: mixed traffic for hours; each answer must equal that of the same request alone."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from rich.table import Table

from promprune_vllm.bench.processes import ProcessUsage, growth, measure_usage
from promprune_vllm.bench.provenance import provenance
from promprune_vllm.bench.soak_requests import Request, pool
from promprune_vllm.bench.soak_routes import ROUTES, Reply
from promprune_vllm.errors import BenchError

GROWTH_LIMIT = 0.02
_STREAMED, _ABORTED = 0.4, 0.1
_ABORT_AFTER_SECONDS = 1.5
_TIMEOUT_SECONDS = 600
_SECONDS_BETWEEN_SAMPLES = 5.0
_WARM_UP = 0.25
"""Share of the run in which growth is no sign of a leak: caches fill, thread and memory pools start up."""
_SHOWN_TROUBLES = 20
_MOST_LOST = 100  # then the soak stops: the server is gone


@dataclass(frozen=True, slots=True)
class Soak:
    """How long and how hard to soak.

    Args:
        requests: Maximum number of requests.
        minutes: Maximum time.
        concurrency: Requests in flight.
        distinct: Number of different requests; each is first sent alone.
        output_tokens: Length of every answer in tokens.
        seed: Random seed of the traffic.
    """

    requests: int
    minutes: float
    concurrency: int = 16
    distinct: int = 64
    output_tokens: int = 8
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """Results of a soak.

    Args:
        counts: Requests by outcome: ``answered``, ``aborted``, ``wrong`` (not the answer it gets alone), ``lost``
            (no answer), ``refused`` (4xx) and ``failed`` (5xx).
        troubles: The first unwanted outcomes, in words.
        usage: Samples of what the server's processes use.
        cache_fill: Samples of how full the image caches are, by cache, as shares of their capacity.
        seconds: Duration of the traffic.
    """

    counts: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    usage: list[ProcessUsage] = field(default_factory=list)
    cache_fill: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def add_trouble(self, kind: str, what: str) -> None:
        """Count an unwanted outcome."""
        self.counts[kind] += 1
        if len(self.troubles) < _SHOWN_TROUBLES:
            self.troubles.append(f"{kind}: {what}")


def run(url: str, soak: Soak, process: int | None, show_progress: Callable[[str], None]) -> dict[str, Any]:
    """Soak a server that nobody else uses.

    Args:
        url: Base address of the server.
        soak: How long and how hard.
        process: Id of its main process, to measure its usage; ``None`` if it runs elsewhere.
        show_progress: Called with a line of text on the progress.

    Raises:
        BenchError: The server does not run the plugin, or it refuses one of the requests when sent alone.
    """
    outcome = asyncio.run(_run(url, soak, process, show_progress))
    relative_growth = {} if process is None else growth(outcome.usage, _WARM_UP)
    bad = {kind: outcome.counts[kind] for kind in ("wrong", "lost", "refused", "failed")}
    filled = {name: max(sample[name] for sample in outcome.cache_fill) for name in outcome.cache_fill[-1]}
    bounded = all(share <= GROWTH_LIMIT for share in relative_growth.values()) and all(
        s <= 1 for s in filled.values()
    )
    return {
        "kind": "soak",
        "url": url,
        **asdict(soak),
        "seconds": round(outcome.seconds, 1),
        "counts": dict(outcome.counts),
        "troubles": outcome.troubles,
        "growth": relative_growth,
        "fullest": filled,
        "held": [asdict(sample) for sample in outcome.usage],
        "passed": not any(bad.values()) and bounded,
        "provenance": provenance(),
    }


async def _run(url: str, soak: Soak, process: int | None, show_progress: Callable[[str], None]) -> Outcome:
    limits = httpx.Limits(max_connections=soak.concurrency + 4, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_SECONDS, limits=limits) as client:
        model, methods = await _describe_server(client)
        requests = pool(model, soak.distinct, methods, soak.output_tokens, soak.seed)
        show_progress(f"Sending {len(requests)} different requests one by one …")
        alone = [await _send_alone(client, request) for request in requests]
        outcome, started = Outcome(), time.monotonic()
        todo = _schedule(soak, started, outcome)

        async def work() -> None:
            for i, draw in todo:  # shared: each worker takes the next one
                await _send(client, requests[i], alone[i], draw, outcome)
                done = sum(outcome.counts.values())
                if done % 100 == 0:
                    show_progress(
                        f"{done} requests, {time.monotonic() - started:.0f} s: {_summary(outcome.counts)}"
                    )

        outcome.cache_fill.append(await _cache_fill(client))
        sampler = asyncio.create_task(_sample(client, process, outcome))
        try:
            await asyncio.gather(*(work() for _ in range(soak.concurrency)))
        finally:
            sampler.cancel()
        outcome.seconds = time.monotonic() - started
    return outcome


def _schedule(soak: Soak, started: float, outcome: Outcome) -> Iterator[tuple[int, random.Random]]:
    draw = random.Random(soak.seed + 1)
    for _ in range(soak.requests):
        if time.monotonic() - started > 60 * soak.minutes or outcome.counts["lost"] >= _MOST_LOST:
            return
        yield draw.randrange(soak.distinct), random.Random(draw.random())


async def _describe_server(client: httpx.AsyncClient) -> tuple[str, list[str]]:
    try:
        models = (await client.get("/v1/models")).raise_for_status().json()
        state = (await client.get("/v1/visual_tokens")).raise_for_status().json()
    except httpx.HTTPError as error:
        raise BenchError(f"{client.base_url} is not a server with promprune-vllm: {error}") from error
    allowed = [method["name"] for method in state["allowed_methods"] if not method.get("over_frames")]
    return models["data"][0]["id"], allowed


async def _send_alone(client: httpx.AsyncClient, request: Request) -> Reply:
    status, reply, text = await _post(client, request)
    if reply is None:
        raise BenchError(f"Sent alone, a request to {request.path} got status {status}: {text[:300]}")
    return reply


async def _send(
    client: httpx.AsyncClient, request: Request, alone: Reply, draw: random.Random, outcome: Outcome
) -> None:
    limit = draw.uniform(0, _ABORT_AFTER_SECONDS) if draw.random() < _ABORTED else None
    ask = _stream if draw.random() < _STREAMED and request.streams else _post
    try:
        async with asyncio.timeout(limit):
            status, reply, text = await ask(client, request)
    except TimeoutError:
        outcome.counts["aborted"] += 1
        return
    except (httpx.HTTPError, ValueError) as error:
        outcome.add_trouble("lost", f"{request.path}: {type(error).__name__}: {error}")
        return
    if reply is None:
        kind = "failed" if status >= httpx.codes.INTERNAL_SERVER_ERROR else "refused"
        outcome.add_trouble(kind, f"{request.path}: status {status}: {text[:300]}")
    elif reply != alone:
        outcome.add_trouble("wrong", f"{request.path}: {reply}, but {alone} when sent alone")
    else:
        outcome.counts["answered"] += 1


_Answered = tuple[int, Reply | None, str]


async def _post(client: httpx.AsyncClient, request: Request) -> _Answered:
    response = await client.post(request.path, json=request.body)
    if response.status_code != httpx.codes.OK:
        return response.status_code, None, response.text
    return response.status_code, ROUTES[request.path].read(response.json()), ""


async def _stream(client: httpx.AsyncClient, request: Request) -> _Answered:
    route = ROUTES[request.path]
    events: list[dict[str, Any]] = []
    async with client.stream("POST", request.path, json={**request.body, **route.stream_fields}) as response:
        if response.status_code != httpx.codes.OK:
            return response.status_code, None, (await response.aread()).decode(errors="replace")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if error := event.get("error"):
                return int(error.get("code") or httpx.codes.INTERNAL_SERVER_ERROR), None, line
            events.append(event)
    return httpx.codes.OK, route.read_stream(events), ""


async def _sample(client: httpx.AsyncClient, process: int | None, outcome: Outcome) -> None:
    while True:
        if process is not None:
            outcome.usage.append(await asyncio.to_thread(measure_usage, process))
        outcome.cache_fill.append(await _cache_fill(client))
        await asyncio.sleep(_SECONDS_BETWEEN_SAMPLES)


async def _cache_fill(client: httpx.AsyncClient) -> dict[str, float]:
    reply = (await client.get("/v1/visual_tokens/caches")).raise_for_status().json()
    shares = {"encoder cache": max(each["rows"] / each["capacity_rows"] for each in reply["encoder"])}
    if (processor := reply["processor"]) is not None:
        shares["processor cache"] = processor["bytes"] / processor["capacity_bytes"]
    return shares


def _summary(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in counts.most_common())


def table(document: dict[str, Any]) -> Table:
    """Return the verdict as a table for the terminal."""
    verdict = "passed" if document["passed"] else "FAILED"
    title = f"{verdict}: {sum(document['counts'].values()):,} requests in {document['seconds'] / 60:.1f} minutes"
    shown = Table("what", "figure", title=title, title_justify="left")
    for kind in ("answered", "aborted", "wrong", "lost", "refused", "failed"):
        shown.add_row(kind, f"{document['counts'].get(kind, 0):,}")
    for name, share in document["growth"].items():
        samples: Sequence[dict[str, Any]] = document["held"]
        shown.add_row(f"{name}, growth after warm-up", f"{share:+.2%} (now {samples[-1][name]:,})")
    for name, share in document["fullest"].items():
        shown.add_row(f"{name}, fullest", f"{share:.0%}")
    for trouble in document["troubles"]:
        shown.add_row("", trouble)
    return shown
