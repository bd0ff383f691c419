"""What a soak asks: a fixed set of requests, as different as those of users."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from promprune_vllm.core.budget import AUTO, FIELD, FULL, METHOD_FIELD
from promprune_vllm.demo import PHOTOS, photo_path

_SIZES = ((640, 427), (320, 240), (240, 320), (96, 96))
_BUDGETS: tuple[object, ...] = (None, None, FULL, AUTO, 64, 64, 200, 1, 0.25, "10%", {"total": 150})
_QUESTIONS = ("What is in the picture?", "Name the colours.", "How many things are there, and where?")
_TEXTS = ("Say something.", "What is a token?", "Count from one to ten, slowly, with a word on each number.")
_MOST_IMAGES = 3


@dataclass(frozen=True, slots=True)
class Reply:
    """What matters of an answer.

    Args:
        text: What was said.
        prompt_tokens: Of the prompt, pruned.
        seen: Visual tokens before pruning.
        kept: That entered the language model.
    """

    text: str
    prompt_tokens: int
    seen: int
    kept: int


def pool(model: str, count: int, methods: Sequence[str], output_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Return bodies of chat requests, the same for the same arguments.

    Args:
        model: Name the server knows it by.
        count: How many.
        methods: That a request may choose.
        output_tokens: Length of every answer.
        seed: Of the choice.
    """
    draw = random.Random(seed)
    return [_body(model, draw, methods, output_tokens) for _ in range(count)]


def _body(model: str, draw: random.Random, methods: Sequence[str], output_tokens: int) -> dict[str, Any]:
    images = draw.choices((0, 1, 2, _MOST_IMAGES), (2, 10, 2, 1))[0]
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": _image(draw.choice(PHOTOS), draw.choice(_SIZES), draw.random())}
        for _ in range(images)
    ]
    parts.append({"type": "text", "text": draw.choice(_QUESTIONS if images else _TEXTS)})
    budget = draw.choice(_BUDGETS)
    if images > 1 and draw.random() < 0.3:
        budget = [draw.choice((32, 0.5, FULL)) for _ in range(images)]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": output_tokens,
        "ignore_eos": True,
    }
    if budget is not None:
        body[FIELD] = budget
    if images and methods and draw.random() < 0.3:
        body[METHOD_FIELD] = draw.choice(list(methods))
    return body


def _image(photo: str, size: tuple[int, int], chance: float) -> dict[str, Any]:
    content = io.BytesIO()
    with Image.open(photo_path(photo)) as file:
        file.convert("RGB").resize(size).save(content, "JPEG", quality=85)
    url = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    return {"url": url, "detail": "low" if chance < 0.1 else "auto"}
