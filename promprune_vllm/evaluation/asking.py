"""Asks questions about pictures over the OpenAI API, many at a time, one picture after the other.

All questions about a picture with one method and one budget follow each other, so that the server encodes and
prunes it once and finds it in its prefix cache afterwards.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from promprune_vllm.core.budget import FIELD, FULL, METHOD_FIELD
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.records import FULL_METHOD, Answer, Key, right
from promprune_vllm.evaluation.target import Target, trusted
from promprune_vllm.evaluation.tasks import SPLIT, Draw, Item, Picture, scenes

ANSWER_TOKENS = 16
_TIMEOUT_SECONDS = 600
_PICTURES_HELD = 8
_IDLE_SECONDS = 2
_ATTEMPTS, _PAUSE_SECONDS = 3, 0.5


@dataclass(frozen=True, slots=True)
class Way:
    """One way to keep tokens: a cell of the matrix.

    Args:
        method: A method of the server; ``full`` keeps every token.
        budget: What a request asks for.
        questions: Asked of each task.
    """

    method: str
    budget: int | float | str
    questions: int

    @property
    def fields(self) -> dict[str, Any]:
        """What a request says beside its messages."""
        return {FIELD: self.budget} | ({} if self.method == FULL_METHOD else {METHOD_FIELD: self.method})

    @property
    def budget_text(self) -> str:
        """The budget as answers carry it."""
        return self.budget if isinstance(self.budget, str) else json.dumps(self.budget)

    @classmethod
    def full(cls, questions: int) -> Way:
        """Return the way that keeps every token."""
        return cls(FULL_METHOD, FULL, questions)


@dataclass(frozen=True, slots=True)
class Job:
    """One question to ask."""

    picture: Picture
    item: Item
    way: Way

    @property
    def key(self) -> Key:
        """What its answer will be kept under."""
        return (self.picture.kind, self.picture.seed, self.item.index, self.way.method, self.way.budget_text)


def jobs(pictures: Sequence[Picture], ways: Sequence[Way], done: Collection[Key] = ()) -> Iterator[Job]:
    """Yield what is still to be asked, picture by picture and way by way.

    Args:
        pictures: In this order.
        ways: Each asks the questions of its first ranks.
        done: Answered already.
    """
    for picture in pictures:
        for way in ways:
            for item in picture.items:
                job = Job(picture, item, way)
                if item.rank < way.questions and job.key not in done:
                    yield job


def ask_all(
    target: Target, todo: Iterator[Job], concurrency: int, tell: Callable[[Answer], None], draw: Draw | None = None
) -> None:
    """Ask everything and return when the last answer is there.

    Args:
        target: Whom.
        todo: What, in this order.
        concurrency: Requests in flight.
        tell: Gets each answer as it comes.
        draw: Makes a scene; that of the demo by default.

    Raises:
        EvaluationError: The server refuses a request, fails, or goes away. Answers told before stay good.
    """
    asyncio.run(_ask_all(target, todo, concurrency, tell, _Images(draw or scenes())))


class _Images:
    """Pictures as data URLs; the last few are held, for the questions in flight."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._held: dict[tuple[str, int], str] = {}

    def url(self, picture: Picture) -> str:
        key = (picture.kind, picture.seed)
        if key not in self._held:
            while len(self._held) >= _PICTURES_HELD:
                del self._held[next(iter(self._held))]
            content = io.BytesIO()
            self._draw(*key, SPLIT).image().save(content, format="PNG", compress_level=1)
            self._held[key] = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
        return self._held[key]


async def _ask_all(
    target: Target, todo: Iterator[Job], concurrency: int, tell: Callable[[Answer], None], images: _Images
) -> None:
    # Servers close a connection that was idle for some seconds, uvicorn after five: none about to be is used.
    limits = httpx.Limits(max_connections=concurrency, keepalive_expiry=_IDLE_SECONDS)
    async with httpx.AsyncClient(
        headers=target.headers, timeout=_TIMEOUT_SECONDS, limits=limits, verify=trusted()
    ) as client:

        async def work() -> None:
            for job in todo:  # shared: each worker takes what is next
                tell(await _ask(client, target, job, images.url(job.picture)))

        workers = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _ask(client: httpx.AsyncClient, target: Target, job: Job, image_url: str) -> Answer:
    started = time.perf_counter()
    reply = await _post(client, f"{target.url}/v1/chat/completions", _body(target.model, job, image_url))
    seconds = time.perf_counter() - started
    if reply.status_code != httpx.codes.OK:
        raise EvaluationError(
            f"The server at {target.url} answers a question with {job.way.fields} with status "
            f"{reply.status_code}: {_message(reply)}"
        )
    return _answer(job, reply.json(), seconds)


async def _post(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> httpx.Response:
    """Post, and again where a connection broke or the server failed: a question changes nothing there.

    vLLM by itself answers with status 500 where a request about the same image was given up before, as by an
    evaluation that was stopped. The plugin mends that (``engine.resending``), so what fails each time is news.
    """
    for left in reversed(range(_ATTEMPTS)):
        try:
            reply = await client.post(url, json=body)
            if reply.status_code < httpx.codes.INTERNAL_SERVER_ERROR or not left:
                return reply
        except httpx.HTTPError as error:
            if not left:
                raise EvaluationError(
                    f"The server at {url} went away ({type(error).__name__}: {error}). Start it again and give "
                    "the same command: what was answered is kept."
                ) from error
        await asyncio.sleep(_PAUSE_SECONDS)
    raise AssertionError("every attempt returns or raises")


def _body(model: str, job: Job, image_url: str) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": image_url}},
        {"type": "text", "text": job.item.text},
    ]
    messages = [{"role": "user", "content": content}]
    return {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
        **job.way.fields,
    }


def _answer(job: Job, reply: dict[str, Any], seconds: float) -> Answer:
    try:
        counted = reply["usage"]["visual_tokens"]
        seen, kept = counted["seen"], counted["kept"]
    except (KeyError, TypeError) as error:
        raise EvaluationError(
            "The server's replies have no usage.visual_tokens, by which the tokens kept are known: a proxy before "
            "it may drop what it does not know, so give the server's own address with --url."
        ) from error
    said = reply["choices"][0]["message"]["content"] or ""
    return Answer(
        kind=job.picture.kind,
        seed=job.picture.seed,
        index=job.item.index,
        task=job.item.task,
        method=job.way.method,
        budget=job.way.budget_text,
        question=job.item.text,
        expected=job.item.answer,
        said=said,
        correct=right(said, job.item.answer),
        seen=seen,
        kept=kept,
        seconds=round(seconds, 4),
    )


def _message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:500]
