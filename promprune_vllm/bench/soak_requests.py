"""The requests of a soak: a fixed set, as varied as those of users."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from PIL import Image

from promprune_vllm.bench.soak_routes import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from promprune_vllm.core.budget import AUTO, FIELD, FULL, METHOD_FIELD
from promprune_vllm.demo import PHOTOS, photo_path

_SIZES = ((640, 427), (320, 240), (240, 320), (96, 96))
_BUDGETS: tuple[object, ...] = (None, None, FULL, AUTO, 64, 64, 200, 1, 0.25, "10%", {"total": 150})
_QUESTIONS = ("What is in the picture?", "Name the colours.", "How many things are there, and where?")
_TEXTS = ("Say something.", "What is a token?", "Count from one to ten, slowly, with a word on each number.")
_MOST_IMAGES = 3
_THING = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
_TOOL = {"name": "count", "description": "Count things.", "parameters": _THING}
_Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the set.

    Args:
        path: Route.
        body: JSON body.
        streams: Whether it can also be streamed, with the same answer.
    """

    path: str
    body: _Body
    streams: bool = True


@dataclass(frozen=True, slots=True)
class _Picture:
    url: str
    detail: str
    name: str | None


def pool(model: str, count: int, methods: Sequence[str], output_tokens: int, seed: int) -> list[Request]:
    """Return requests to several routes; the same arguments give the same requests.

    Args:
        model: Model name at the server.
        count: Number of requests.
        methods: Methods that a request may select.
        output_tokens: Length of every answer, unless a stop string or a grammar ends it earlier.
        seed: Random seed.
    """
    draw = random.Random(seed)
    return [_request(model, draw, methods, output_tokens) for _ in range(count)]


def _request(model: str, draw: random.Random, methods: Sequence[str], output_tokens: int) -> Request:
    path = draw.choices((CHAT, RESPONSES, MESSAGES, COMPLETIONS), (10, 3, 3, 1))[0]
    images = 0 if path == COMPLETIONS else draw.choices((0, 1, 2, _MOST_IMAGES), (2, 10, 2, 1))[0]
    pictures = [_picture(draw) for _ in range(images)]
    words = draw.choice(_QUESTIONS if images else _TEXTS)
    body = {"model": model, "temperature": 0, **_SHAPES[path](pictures, words, output_tokens)}
    budget = draw.choice(_BUDGETS)
    if images > 1 and draw.random() < 0.3:
        budget = [draw.choice((32, 0.5, FULL)) for _ in range(images)]
    if budget is not None:
        body[FIELD] = budget
    if images and methods and draw.random() < 0.3:
        body[METHOD_FIELD] = draw.choice(list(methods))
    streams = _vary(draw, path, body)
    return Request(path, body, streams)


def _vary(draw: random.Random, path: str, body: _Body) -> bool:
    """Add other request fields that users send; return whether a stream would give the same answer."""
    # Sampling with a seed would also repeat its answers, but vLLM on a CPU crashes on a seed if a prompt is
    # prefilled in several steps. With a single candidate, sampling repeats without a seed.
    if draw.random() < 0.2:
        body |= _ONE_CANDIDATE
    elif path != MESSAGES and draw.random() < 0.2:
        body["seed"] = draw.randrange(1000)
    if draw.random() < 0.15:
        body["stop_sequences" if path == MESSAGES else "stop"] = draw.choice((["e"], ["t", "zz"]))
    if path in (CHAT, COMPLETIONS):
        if draw.random() < 0.15:
            body.pop("seed", None)
            body |= {"n": 2, **_ONE_CANDIDATE}
        if draw.random() < 0.1:
            body |= {"logit_bias": {"70": 2}, "min_tokens": 1}
    if path != MESSAGES and draw.random() < 0.25:
        body.update(_LOGPROBS[path])
    if draw.random() < 0.1:
        body["cache_salt"] = "a secret"
    return _constrain(draw, path, body) if draw.random() < 0.3 else True


_ONE_CANDIDATE: Mapping[str, Any] = MappingProxyType({"temperature": 0.8, "top_k": 1})
_LOGPROBS: Mapping[str, _Body] = MappingProxyType(
    {
        CHAT: {"logprobs": True, "top_logprobs": 5},
        COMPLETIONS: {"logprobs": 5},
        RESPONSES: {"top_logprobs": 5, "include": ["message.output_text.logprobs"]},
    }
)


def _constrain(draw: random.Random, path: str, body: _Body) -> bool:
    """Constrain the answer by a grammar, or offer a tool (not called: that needs a server with a tool parser)."""
    if path == MESSAGES:
        body["tools"] = [{"name": "count", "description": "Count things.", "input_schema": _THING}]
        body["tool_choice"] = {"type": "none"}
        return True
    body["ignore_eos"] = False  # nothing can follow the end of a grammar
    form = draw.randrange(4 if path == CHAT else 3)
    if form == 0:
        body["structured_outputs"] = {"choice": ["a cup of coffee", "a cat"]}
    elif form == 1:
        body["structured_outputs"] = {"regex": "[a-f]{3}[0-9]+"}
    elif form == 2:
        json_object = {"type": "json_object"}
        body.update({"text": {"format": json_object}} if path == RESPONSES else {"response_format": json_object})
    else:
        body["tools"] = [{"type": "function", "function": _TOOL}]
        body["tool_choice"] = "none"
    return True


def _picture(draw: random.Random) -> _Picture:
    photo, size = draw.choice(PHOTOS), draw.choice(_SIZES)
    content = io.BytesIO()
    with Image.open(photo_path(photo)) as file:
        file.convert("RGB").resize(size).save(content, "JPEG", quality=85)
    url = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    detail = "low" if draw.random() < 0.1 else "auto"
    return _Picture(url, detail, f"{photo} {size}" if draw.random() < 0.3 else None)


def _chat(pictures: Sequence[_Picture], words: str, output_tokens: int) -> _Body:
    parts: list[_Body] = [
        {"type": "image_url", "image_url": {"url": each.url, "detail": each.detail}}
        | ({"uuid": each.name} if each.name else {})
        for each in pictures
    ]
    content = [*parts, {"type": "text", "text": words}]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
    }


def _response(pictures: Sequence[_Picture], words: str, output_tokens: int) -> _Body:
    parts = [{"type": "input_image", "image_url": each.url, "detail": each.detail} for each in pictures]
    content = [*parts, {"type": "input_text", "text": words}]
    items = [{"role": "user", "content": content}]
    return {"input": items, "max_output_tokens": output_tokens, "ignore_eos": True, "store": False}


def _message(pictures: Sequence[_Picture], words: str, output_tokens: int) -> _Body:
    sources = [
        {"type": "base64", "media_type": "image/jpeg", "data": each.url.partition(",")[2]} for each in pictures
    ]
    content = [*({"type": "image", "source": each} for each in sources), {"type": "text", "text": words}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": output_tokens}


def _completion(_: Sequence[_Picture], words: str, output_tokens: int) -> _Body:
    return {"prompt": words, "max_tokens": output_tokens, "ignore_eos": True}


_SHAPES: Mapping[str, Callable[[Sequence[_Picture], str, int], _Body]] = MappingProxyType(
    {CHAT: _chat, RESPONSES: _response, MESSAGES: _message, COMPLETIONS: _completion}
)
