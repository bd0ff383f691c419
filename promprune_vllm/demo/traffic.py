"""Generates the requests of ``promprune demo --traffic`` from a seed, and sums up the results; pure functions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

PLAIN, UNSURE, TEXT, REFUSED = "no budget", "again if unsure", "text only", "refused on purpose"
QUESTIONS = (
    "What is in the picture?",
    "Describe the picture in one sentence.",
    "Which colours stand out?",
    "Is there any text to be read?",
)
POOL = 27
"""Number of pictures that are sent repeatedly; their names are the numbers below it."""
_KINDS = {
    PLAIN: 14,
    "tokens": 24,
    "share": 14,
    "full": 5,
    "auto": 10,
    "list": 8,
    "total": 8,
    UNSURE: 8,
    TEXT: 8,
    REFUSED: 6,
}
"""Kinds of requests, with their relative frequency."""
_BUDGETS: dict[str, tuple[object, ...]] = {
    "tokens": (32, 64, 128, 128, 256),
    "share": (0.1, "25%", "50%"),
    "full": ("full",),
    "auto": ("auto",),
    "list": ([64, "full"], ["25%", 128], [64, 64]),
    "total": ({"total": 128}, {"total": 512}),
    UNSURE: (32, 64, 128),
    REFUSED: (0, "plenty", [64, 64, 64, 64, 64]),
}
_NO_METHOD = "no-such-method"
_ESCALATIONS: tuple[object, ...] = (True, {"below": 0.9, "to": 256}, 1e-6)
"""Of requests whose answer may be asked for again. The last is so low that every answer is sure enough."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image: a picture of the pool, or a crop of one.

    Args:
        name: Number of the picture in the pool.
        box: Crop: left, top and side as shares; ``None`` for the whole picture, which is sent repeatedly.
    """

    name: int
    box: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send.

    Args:
        kind: A key of ``_KINDS``: the form of the budget, or another property of the request.
        pictures: Images; empty for a text-only request.
        budget: ``visual_token_budget``; ``None`` leaves it out.
        method: ``visual_token_method``; ``None`` leaves it out.
        escalate: ``visual_token_escalate``; ``None`` leaves it out.
        question: Text of the request.
        answer_tokens: Length of the answer in tokens.
        stream: Whether the answer is streamed.
        abort: Whether the client disconnects after the first chunk of a stream.
    """

    kind: str
    pictures: tuple[Picture, ...]
    budget: object
    method: str | None
    escalate: object
    question: str
    answer_tokens: int
    stream: bool
    abort: bool


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one request.

    Args:
        kind: Kind of the request.
        outcome: ``answered``, ``aborted`` by the client, ``refused`` by the server, or ``failed``.
        seen: Visual tokens of its images before pruning, from the reply.
        kept: Visual tokens that entered the language model, from the reply.
        asked_again: Whether its first answer was thrown away for one with more visual tokens, from the reply.
    """

    kind: str
    outcome: str
    seen: int = 0
    kept: int = 0
    asked_again: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """Sums over the requests of one kind, or over all."""

    kind: str
    requests: int
    seen: int
    kept: int
    saved: int
    asked_again: int
    refused: int
    aborted: int
    failed: int


def plan(seed: int, methods: Sequence[str] = ()) -> Iterator[Request]:
    """Yield requests endlessly: first one of every kind, then a mix. The same seed gives the same requests.

    Args:
        seed: Random seed.
        methods: Methods that the server allows besides its default; one request in five selects one of them.
    """
    rng = random.Random(seed)
    tour = [_ask(rng, kind, ()) for kind in _KINDS]
    tour += [_ask(rng, REFUSED, (), refusal=i) for i in range(len(_BUDGETS[REFUSED]) + 1)]
    tour += [replace(_ask(rng, UNSURE, ()), escalate=each) for each in _ESCALATIONS]
    tour += [replace(_ask(rng, "tokens", ()), method=method) for method in methods]
    tour.append(replace(_ask(rng, "tokens", ()), stream=True, abort=True))
    rng.shuffle(tour)
    yield from tour
    while True:
        (kind,) = rng.choices(list(_KINDS), list(_KINDS.values()))
        yield _ask(rng, kind, methods)


def _ask(rng: random.Random, kind: str, methods: Sequence[str], refusal: int | None = None) -> Request:
    several = 2 if kind in ("list", "total") or (kind in ("tokens", "share") and rng.random() < 0.15) else 1
    pictures = tuple(_picture(rng) for _ in range(0 if kind == TEXT else several))
    budget = rng.choice(_BUDGETS[kind]) if kind in _BUDGETS else None
    method = rng.choice(methods) if methods and pictures and kind != REFUSED and rng.random() < 0.2 else None
    if kind == REFUSED:
        wrong = rng.randrange(len(_BUDGETS[REFUSED]) + 1) if refusal is None else refusal
        budget, method = (64, _NO_METHOD) if wrong == len(_BUDGETS[REFUSED]) else (_BUDGETS[REFUSED][wrong], None)
    # A stream's headers tell the first try, and the sums are of what is answered.
    stream = kind != UNSURE and rng.random() < 0.5
    return Request(
        kind=kind,
        pictures=pictures,
        budget=budget,
        method=method,
        escalate=rng.choice(_ESCALATIONS) if kind == UNSURE else None,
        question=rng.choice(QUESTIONS),
        answer_tokens=rng.randint(4, 24),
        stream=stream,
        abort=stream and kind != REFUSED and rng.random() < 0.1,
    )


def _picture(rng: random.Random) -> Picture:
    """Draw a picture: two of three are whole pictures of the pool, low numbers most often; the rest new crops."""
    name = min(int(rng.expovariate(0.25)), POOL - 1)
    if rng.random() < 2 / 3:
        return Picture(name)
    side = rng.uniform(0.4, 0.9)
    return Picture(name, (rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side))


def lines(sent: Sequence[Result]) -> list[Line]:
    """Return one line for each kind that was sent, in the order of ``_KINDS``."""
    return [_sum(kind, [each for each in sent if each.kind == kind]) for kind in _KINDS if _has(sent, kind)]


def total(sent: Sequence[Result]) -> Line:
    """Return the line for all requests together."""
    return _sum("all", sent)


def _has(sent: Sequence[Result], kind: str) -> bool:
    return any(each.kind == kind for each in sent)


def _sum(kind: str, sent: Sequence[Result]) -> Line:
    seen, kept = sum(each.seen for each in sent), sum(each.kept for each in sent)
    of = {name: sum(each.outcome == name for each in sent) for name in ("refused", "aborted", "failed")}
    again = sum(each.asked_again for each in sent)
    return Line(kind, requests=len(sent), seen=seen, kept=kept, saved=seen - kept, asked_again=again, **of)
