"""``promprune bench soak``: mixed traffic for hours, every answer compared with the one given alone."""

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

from promprune_vllm.bench.processes import Held, growth, held
from promprune_vllm.bench.provenance import provenance
from promprune_vllm.bench.soak_requests import Request, pool
from promprune_vllm.bench.soak_routes import ROUTES, Reply
from promprune_vllm.errors import BenchError

GROWTH_LIMIT = 0.02
_STREAMED, _ABORTED = 0.4, 0.1
_ABORT_AFTER_SECONDS = 1.5
_TIMEOUT_SECONDS = 600
_SECONDS_BETWEEN_LOOKS = 5.0
_WARM_UP = 0.25
"""Of the time, before which growing is no sign of a leak: caches fill, pools of threads and memory come up."""
_SHOWN_TROUBLES = 20
_MOST_LOST = 100  # after which the server is given up


@dataclass(frozen=True, slots=True)
class Soak:
    """How long, and how hard.

    Args:
        requests: Sent, at most.
        minutes: Sent for so long, at most.
        concurrency: In flight.
        distinct: Different requests among them, each asked alone first.
        output_tokens: Length of every answer.
        seed: Of all choices.
    """

    requests: int
    minutes: float
    concurrency: int = 16
    distinct: int = 64
    output_tokens: int = 8
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """What came of it.

    Args:
        counts: Of ``answered``, ``aborted``, ``wrong`` (another answer than alone), ``lost`` (none), ``refused``
            (4xx) and ``failed`` (5xx).
        troubles: The first of them, in words.
        held: What the server held, look by look.
        filled: What the caches of images held, look by look, as shares of what fits in.
        seconds: That the traffic took.
    """

    counts: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    filled: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def trouble(self, kind: str, what: str) -> None:
        """Count something that must not be."""
        self.counts[kind] += 1
        if len(self.troubles) < _SHOWN_TROUBLES:
            self.troubles.append(f"{kind}: {what}")


def run(url: str, soak: Soak, process: int | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Soak a server that nobody else uses.

    Args:
        url: Its base address.
        soak: How long, and how hard.
        process: Id of its main process, to watch what it holds; ``None`` where it runs elsewhere.
        tell: Told what is being done.

    Raises:
        BenchError: The server is none of ours, or refuses a request of the set when it is asked alone.
    """
    outcome = asyncio.run(_run(url, soak, process, tell))
    grown = {} if process is None else growth(outcome.held, _WARM_UP)
    bad = {kind: outcome.counts[kind] for kind in ("wrong", "lost", "refused", "failed")}
    filled = {name: max(look[name] for look in outcome.filled) for name in outcome.filled[-1]}
    bounded = all(share <= GROWTH_LIMIT for share in grown.values()) and all(s <= 1 for s in filled.values())
    return {
        "kind": "soak",
        "url": url,
        **asdict(soak),
        "seconds": round(outcome.seconds, 1),
        "counts": dict(outcome.counts),
        "troubles": outcome.troubles,
        "growth": grown,
        "fullest": filled,
        "held": [asdict(look) for look in outcome.held],
        "passed": not any(bad.values()) and bounded,
        "provenance": provenance(),
    }


async def _run(url: str, soak: Soak, process: int | None, tell: Callable[[str], None]) -> Outcome:
    limits = httpx.Limits(max_connections=soak.concurrency + 4, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_SECONDS, limits=limits) as client:
        model, methods = await _server(client)
        asked = pool(model, soak.distinct, methods, soak.output_tokens, soak.seed)
        tell(f"Asking {len(asked)} different requests one by one …")
        alone = [await _alone(client, request) for request in asked]
        outcome, started = Outcome(), time.monotonic()
        todo = _drawn(soak, started, outcome)

        async def work() -> None:
            for i, draw in todo:  # shared: each worker takes what is next
                await _one(client, asked[i], alone[i], draw, outcome)
                done = sum(outcome.counts.values())
                if done % 100 == 0:
                    tell(f"{done} requests, {time.monotonic() - started:.0f} s: {_told(outcome.counts)}")

        outcome.filled.append(await _filled(client))
        watching = asyncio.create_task(_watch(client, process, outcome))
        try:
            await asyncio.gather(*(work() for _ in range(soak.concurrency)))
        finally:
            watching.cancel()
        outcome.seconds = time.monotonic() - started
    return outcome


def _drawn(soak: Soak, started: float, outcome: Outcome) -> Iterator[tuple[int, random.Random]]:
    draw = random.Random(soak.seed + 1)
    for _ in range(soak.requests):
        if time.monotonic() - started > 60 * soak.minutes or outcome.counts["lost"] >= _MOST_LOST:
            return
        yield draw.randrange(soak.distinct), random.Random(draw.random())


async def _server(client: httpx.AsyncClient) -> tuple[str, list[str]]:
    try:
        models = (await client.get("/v1/models")).raise_for_status().json()
        state = (await client.get("/v1/visual_tokens")).raise_for_status().json()
    except httpx.HTTPError as error:
        raise BenchError(f"{client.base_url} is no server with promprune-vllm: {error}") from error
    return models["data"][0]["id"], [method["name"] for method in state["allowed_methods"]]


async def _alone(client: httpx.AsyncClient, request: Request) -> Reply:
    status, reply, said = await _whole(client, request)
    if reply is None:
        raise BenchError(f"Asked alone, a request of {request.path} got status {status}: {said[:300]}")
    return reply


async def _one(
    client: httpx.AsyncClient, request: Request, alone: Reply, draw: random.Random, outcome: Outcome
) -> None:
    limit = draw.uniform(0, _ABORT_AFTER_SECONDS) if draw.random() < _ABORTED else None
    ask = _streamed if draw.random() < _STREAMED and request.streams else _whole
    try:
        async with asyncio.timeout(limit):
            status, reply, said = await ask(client, request)
    except TimeoutError:
        outcome.counts["aborted"] += 1
        return
    except (httpx.HTTPError, ValueError) as error:
        outcome.trouble("lost", f"{request.path}: {type(error).__name__}: {error}")
        return
    if reply is None:
        kind = "failed" if status >= httpx.codes.INTERNAL_SERVER_ERROR else "refused"
        outcome.trouble(kind, f"{request.path}: status {status}: {said[:300]}")
    elif reply != alone:
        outcome.trouble("wrong", f"{request.path}: {reply} where {alone} was answered alone")
    else:
        outcome.counts["answered"] += 1


_Answered = tuple[int, Reply | None, str]


async def _whole(client: httpx.AsyncClient, request: Request) -> _Answered:
    response = await client.post(request.path, json=request.body)
    if response.status_code != httpx.codes.OK:
        return response.status_code, None, response.text
    return response.status_code, ROUTES[request.path].read(response.json()), ""


async def _streamed(client: httpx.AsyncClient, request: Request) -> _Answered:
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


async def _watch(client: httpx.AsyncClient, process: int | None, outcome: Outcome) -> None:
    while True:
        if process is not None:
            outcome.held.append(await asyncio.to_thread(held, process))
        outcome.filled.append(await _filled(client))
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)


async def _filled(client: httpx.AsyncClient) -> dict[str, float]:
    told = (await client.get("/v1/visual_tokens/caches")).raise_for_status().json()
    shares = {"encoder cache": max(each["rows"] / each["capacity_rows"] for each in told["encoder"])}
    if (processor := told["processor"]) is not None:
        shares["processor cache"] = processor["bytes"] / processor["capacity_bytes"]
    return shares


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in counts.most_common())


def table(document: dict[str, Any]) -> Table:
    """Return the verdict as a table for the terminal."""
    verdict = "passed" if document["passed"] else "FAILED"
    title = f"{verdict}: {sum(document['counts'].values()):,} requests in {document['seconds'] / 60:.1f} minutes"
    shown = Table("what", "figure", title=title, title_justify="left")
    for kind in ("answered", "aborted", "wrong", "lost", "refused", "failed"):
        shown.add_row(kind, f"{document['counts'].get(kind, 0):,}")
    for name, share in document["growth"].items():
        looks: Sequence[dict[str, Any]] = document["held"]
        shown.add_row(f"{name}, growth after warming up", f"{share:+.2%} (now {looks[-1][name]:,})")
    for name, share in document["fullest"].items():
        shown.add_row(f"{name}, fullest", f"{share:.0%}")
    for trouble in document["troubles"]:
        shown.add_row("", trouble)
    return shown
