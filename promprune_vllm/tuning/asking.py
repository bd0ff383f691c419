"""Asks an operator's questions with each method and budget, and audits answers that pruning has changed.

An audit appends the answer to the prompt with all tokens. One prefill without decoding then tells the rank and
the probability of each of its tokens there. An answer that is the same as with all tokens needs none: decoding was
greedy, so each of its tokens is the likeliest.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.sender import Size, Way, confidence_of, counted, error_text, in_flight, post
from promprune_vllm.evaluation.target import Target
from promprune_vllm.tuning.questions import Question, opened
from promprune_vllm.tuning.records import Audit, Key, Said

FULL_WAY = Way.full(1)
_HELD = 16  # images
_ROUTE = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Asked:
    """How to ask all questions: a method with a budget.

    Args:
        way: The method and budget, as they are stored with the answers.
        smaller: If the client makes the images smaller instead: their sizes, by those of the originals.
    """

    way: Way
    smaller: Mapping[Size, Size] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The request fields for it."""
        return self.way.fields if self.smaller is None else FULL_WAY.fields

    def key(self, question: Question) -> Key:
        """Return the key of the answer to a question."""
        return (question.id, self.way.method, self.way.budget_text)


@dataclass(frozen=True, slots=True)
class Changed:
    """A question with an answer of fewer tokens, and the number of prompt tokens with all of them."""

    question: Question
    answer: Said
    prompt_tokens: int


class AuditRefused(EvaluationError):
    """The server does not tell the log-probabilities of a prompt, or cannot continue an answer."""


def ask_all(
    target: Target,
    todo: Iterator[tuple[Question, Asked]],
    concurrency: int,
    answer_tokens: int,
    on_answer: Callable[[Said], None],
) -> None:
    """Ask questions; return after the last answer.

    Args:
        target: Server to ask.
        todo: Questions with ways, in this order.
        concurrency: Requests in flight.
        answer_tokens: Longest answer, in tokens.
        on_answer: Called with each answer as it arrives.

    Raises:
        EvaluationError: The server refuses a request, fails, or goes away. Earlier answers remain valid.
    """
    images = _Images()

    async def ask(client: httpx.AsyncClient, job: tuple[Question, Asked]) -> None:
        question, asked = job
        body = {
            **_body(target.model, question, images, asked.smaller),
            **{"max_tokens": answer_tokens, "logprobs": True, "top_logprobs": 2},
            **asked.fields,
        }
        started = time.perf_counter()
        reply = await post(client, f"{target.url}{_ROUTE}", body)
        if reply.status_code != httpx.codes.OK:
            raise EvaluationError(
                f"The server at {target.url} answered question {question.id!r} with {asked.fields} with status "
                f"{reply.status_code}: {error_text(reply)}"
            )
        on_answer(_said(asked.key(question), reply.json(), time.perf_counter() - started))

    asyncio.run(in_flight(target, todo, concurrency, ask))


def audit_all(
    target: Target, todo: Iterator[Changed], concurrency: int, on_audit: Callable[[Audit], None]
) -> None:
    """Audit changed answers; return after the last.

    Args:
        target: Server to ask.
        todo: Answers, in this order.
        concurrency: Requests in flight.
        on_audit: Called with each audit as it arrives.

    Raises:
        AuditRefused: The server refuses such a request.
        EvaluationError: It goes away.
    """
    images = _Images()

    async def ask(client: httpx.AsyncClient, job: Changed) -> None:
        body = _body(target.model, job.question, images, None)
        body["messages"].append({"role": "assistant", "content": job.answer.text})
        body |= {"add_generation_prompt": False, "continue_final_message": True, "prompt_logprobs": 1}
        reply = await post(client, f"{target.url}{_ROUTE}", {**body, "max_tokens": 1, **FULL_WAY.fields})
        if reply.status_code != httpx.codes.OK:
            raise AuditRefused(f"status {reply.status_code}: {error_text(reply)}")
        on_audit(_audit(job, reply.json()))

    asyncio.run(in_flight(target, todo, concurrency, ask))


class _Images:
    """Images as data URLs; keeps the last few for the questions in flight."""

    def __init__(self) -> None:
        self._held: dict[tuple[Path, Size | None], str] = {}

    def url(self, path: Path, size: Size | None = None) -> str:
        key = (path, size)
        if key not in self._held:
            while len(self._held) >= _HELD:
                del self._held[next(iter(self._held))]
            self._held[key] = data_url(path.read_bytes() if size is None else _resized(path, size))
        return self._held[key]


def data_url(content: bytes) -> str:
    """Return an image file as a data URL."""
    with Image.open(io.BytesIO(content)) as image:
        kind = Image.MIME.get(image.format or "", "image/png")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _resized(path: Path, size: Size) -> bytes:
    content = io.BytesIO()
    opened(path).resize(size, Image.Resampling.LANCZOS).save(content, format="PNG", compress_level=1)
    return content.getvalue()


def _body(model: str, question: Question, images: _Images, smaller: Mapping[Size, Size] | None) -> dict[str, Any]:
    """Return the part of a request that audits share; there is no sampling."""
    sizes = [None if smaller is None else smaller[size] for size in question.sizes]
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": images.url(path, size)}}
        for path, size in zip(question.images, sizes, strict=True)
    ]
    content.append({"type": "text", "text": question.text})
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}


def _said(key: Key, reply: dict[str, Any], seconds: float) -> Said:
    seen, kept = counted(reply)
    choice, usage = reply["choices"][0], reply["usage"]
    return Said(
        *key,
        text=choice["message"]["content"] or "",
        seen=seen,
        kept=kept,
        prompt_tokens=usage["prompt_tokens"],
        tokens=usage["completion_tokens"] - (choice["finish_reason"] == "stop"),
        confidence=confidence_of(choice),
        seconds=round(seconds, 4),
        cut_off=choice["finish_reason"] == "length",
    )


def _audit(job: Changed, reply: dict[str, Any]) -> Audit:
    """Read what all tokens say about an answer: it is what the prompt is longer by than without it."""
    try:
        number = max(0, reply["usage"]["prompt_tokens"] - job.prompt_tokens)
        tokens = reply["prompt_logprobs"][-number:] if number else []
        first, nats = 0, 0.0
        for each in tokens:
            likeliest, said = (pick(each.values(), key=lambda token: token["rank"]) for pick in (min, max))
            first += said["rank"] == 1
            nats += likeliest["logprob"] - said["logprob"]
    except (KeyError, TypeError, AttributeError) as error:
        raise AuditRefused("its replies have no prompt_logprobs") from error
    return Audit(*job.answer.key, tokens=len(tokens), first=first, nats=round(nats, 6))
