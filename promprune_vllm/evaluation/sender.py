"""Sends questions about pictures over the OpenAI API, many at a time, one picture after the other.

All questions about a picture with one method and budget are sent together, so that the server encodes and prunes
the picture once and then finds it in its prefix cache.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from PIL.Image import Resampling

from promprune_vllm.core.budget import FIELD, FULL, METHOD_FIELD
from promprune_vllm.core.escalation import ESCALATE_FIELD, WINDOW
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.records import FULL_METHOD, Answer, Key, is_right
from promprune_vllm.evaluation.target import Target, tls_context
from promprune_vllm.evaluation.tasks import SPLIT, Draw, Item, Picture, scenes

ANSWER_TOKENS = 16
DOWNSAMPLE = "downsample"
"""The method that the client replaces by a smaller image, where that has fewer tokens."""
Size = tuple[int, int]
"""Width and height of an image, in pixels."""
_TIMEOUT_SECONDS = 600
_PICTURES_HELD = 8
_IDLE_SECONDS = 2
_ATTEMPTS, _PAUSE_SECONDS = 3, 0.5
_MOST_QUESTIONS = 1000  # about one picture
_Job = TypeVar("_Job")


@dataclass(frozen=True, slots=True)
class Way:
    """A method with a budget: one cell of the matrix.

    Args:
        method: A method of the server; ``full`` keeps every token.
        budget: Budget of the requests.
        questions: Number of questions per task.
        smaller: Size of the image that is sent instead of one pruned by the method.
    """

    method: str
    budget: int | float | str
    questions: int
    smaller: Size | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The request fields for it. Only first answers are asked for, whatever the server's default is."""
        if self.smaller is not None:
            return Way.full(self.questions).fields
        once = {FIELD: self.budget, ESCALATE_FIELD: False}
        return once if self.method == FULL_METHOD else {**once, METHOD_FIELD: self.method}

    @property
    def budget_text(self) -> str:
        """The budget as it is written in answers."""
        return self.budget if isinstance(self.budget, str) else json.dumps(self.budget)

    @classmethod
    def full(cls, questions: int) -> Way:
        """Return the one that keeps every token."""
        return cls(FULL_METHOD, FULL, questions)


@dataclass(frozen=True, slots=True)
class Job:
    """One question to ask."""

    picture: Picture
    item: Item
    way: Way

    @property
    def key(self) -> Key:
        """The key of its answer."""
        return (self.picture.kind, self.picture.seed, self.item.index, self.way.method, self.way.budget_text)


def jobs(pictures: Sequence[Picture], ways: Sequence[Way], done: Collection[Key] = ()) -> Iterator[Job]:
    """Yield the questions still to be asked, picture by picture and way by way.

    Args:
        pictures: Pictures in the order in which to ask about them.
        ways: Methods with budgets; each asks the first ``way.questions`` questions of a task.
        done: Keys of the questions that have answers.
    """
    for picture in pictures:
        for way in ways:
            for item in picture.items:
                job = Job(picture, item, way)
                if item.rank < way.questions and job.key not in done:
                    yield job


def ask_all(
    target: Target,
    todo: Iterator[Job],
    concurrency: int,
    on_answer: Callable[[Answer], None],
    draw: Draw | None = None,
    *,
    temperature: float = 0,
) -> None:
    """Ask all questions; return after the last answer.

    Args:
        target: Server to ask.
        todo: Questions, in this order.
        concurrency: Requests in flight.
        on_answer: Called with each answer as it arrives.
        draw: Draws a scene; the demo's generator by default.
        temperature: Sampling temperature. Above 0, a question has one seed, whatever its tokens.

    Raises:
        EvaluationError: The server refuses a request, fails, or goes away. Earlier answers remain valid.
    """
    images = _Images(draw or scenes())

    async def ask(client: httpx.AsyncClient, job: Job) -> None:
        body = _body(target.model, job, images.url(job), temperature)
        on_answer(await _ask(client, target, job, body))

    asyncio.run(in_flight(target, todo, concurrency, ask))


class _Images:
    """Pictures as data URLs; keeps the last few for the questions in flight."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._held: dict[tuple[str, int, Size | None], str] = {}

    def url(self, job: Job) -> str:
        key = (job.picture.kind, job.picture.seed, job.way.smaller)
        if key not in self._held:
            while len(self._held) >= _PICTURES_HELD:
                del self._held[next(iter(self._held))]
            content = io.BytesIO()
            image = self._draw(job.picture.kind, job.picture.seed, SPLIT).image()
            if job.way.smaller is not None:
                image = image.resize(job.way.smaller, Resampling.LANCZOS)
            image.save(content, format="PNG", compress_level=1)
            self._held[key] = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
        return self._held[key]


async def in_flight(
    target: Target,
    todo: Iterator[_Job],
    concurrency: int,
    ask: Callable[[httpx.AsyncClient, _Job], Awaitable[None]],
) -> None:
    """Work through jobs in their order; return after the last, or raise the first error.

    Args:
        target: Server to ask.
        todo: Jobs, in this order.
        concurrency: Jobs under way at the same time.
        ask: Does one job.
    """
    # Servers close idle connections (uvicorn after five seconds), so never reuse one that is about to be closed.
    limits = httpx.Limits(max_connections=concurrency, keepalive_expiry=_IDLE_SECONDS)
    async with httpx.AsyncClient(
        headers=target.headers, timeout=_TIMEOUT_SECONDS, limits=limits, verify=tls_context()
    ) as client:

        async def work() -> None:
            for job in todo:  # shared: each worker takes the next one
                await ask(client, job)

        workers = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _ask(client: httpx.AsyncClient, target: Target, job: Job, body: dict[str, Any]) -> Answer:
    started = time.perf_counter()
    reply = await post(client, f"{target.url}/v1/chat/completions", body)
    seconds = time.perf_counter() - started
    if reply.status_code != httpx.codes.OK:
        raise EvaluationError(
            f"The server at {target.url} answered a question with {job.way.fields} with status "
            f"{reply.status_code}: {error_text(reply)}"
        )
    return _answer(job, reply.json(), seconds)


async def post(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> httpx.Response:
    """Post a question; retry if the connection breaks or the server fails, since questions have no side effects.

    vLLM by itself answers with status 500 if an earlier request with the same image was aborted, for example by
    stopping an evaluation. The plugin fixes that (``engine.vllm_fixes.resending``), so repeated failures are real.
    """
    for left in reversed(range(_ATTEMPTS)):
        try:
            reply = await client.post(url, json=body)
            if reply.status_code < httpx.codes.INTERNAL_SERVER_ERROR or not left:
                return reply
        except httpx.HTTPError as error:
            if not left:
                raise EvaluationError(
                    f"The server at {url} went away ({type(error).__name__}: {error}). Restart it and run the "
                    "same command again: all answers so far are kept."
                ) from error
        await asyncio.sleep(_PAUSE_SECONDS)
    raise AssertionError("every attempt returns or raises")


def _body(model: str, job: Job, image_url: str, temperature: float) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": image_url}},
        {"type": "text", "text": job.item.text},
    ]
    messages = [{"role": "user", "content": content}]
    return {
        "model": model,
        "messages": messages,
        "temperature": temperature,
        **({"seed": job.picture.seed * _MOST_QUESTIONS + job.item.index} if temperature else {}),
        "max_tokens": ANSWER_TOKENS,
        "logprobs": True,
        "top_logprobs": 2,  # vLLM lists the chosen token first, so one would not tell a likelier token
        **job.way.fields,
    }


def _answer(job: Job, reply: dict[str, Any], seconds: float) -> Answer:
    seen, kept = counted(reply)
    choice = reply["choices"][0]
    said = choice["message"]["content"] or ""
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
        correct=is_right(said, job.item.answer),
        seen=seen,
        kept=kept,
        seconds=round(seconds, 4),
        confidence=confidence_of(choice),
    )


def counted(reply: dict[str, Any]) -> tuple[int, int]:
    """Return the visual tokens of a reply's images before pruning, and how many of them were kept."""
    try:
        tokens = reply["usage"]["visual_tokens"]
        return tokens["seen"], tokens["kept"]
    except (KeyError, TypeError) as error:
        raise EvaluationError(
            "The server's replies have no usage.visual_tokens, which counts the kept tokens. A proxy in front of "
            "it may drop unknown fields: give the server's own address with --url."
        ) from error


def confidence_of(choice: dict[str, Any]) -> float:
    """Return the smallest probability of a likeliest token among the first tokens of an answer."""
    try:
        tokens = choice["logprobs"]["content"][:WINDOW]
        return min(math.exp(max(each["logprob"] for each in token["top_logprobs"])) for token in tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            "The server's replies have no logprobs, which say how sure the model was. A proxy in front of it may "
            "drop them: give the server's own address with --url."
        ) from error


def error_text(reply: httpx.Response) -> str:
    """Return what an OpenAI error object says, or the start of any other reply."""
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:500]
