"""Questions and a server for the tests of tuning: no model, no vLLM."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from promprune_vllm.core.budget import Budget
from promprune_vllm.tuning.questions import Question
from promprune_vllm.tuning.records import Records, Said
from tests.unit.evaluated import STATE

_LIMITS = {"min": 1, "max": None, "low": 1, "out_of_range": "clamp", "default": 64}
TUNED_STATE = {**STATE, "escalation": {"reason": None}, "limits": _LIMITS}
FULL_TOKENS = 100


def questions(clusters: Sequence[int], answer: str | None = None) -> tuple[Question, ...]:
    """One question for each number of an image."""
    return tuple(
        Question(str(place), (Path("none.png"),), ((8, 8),), (str(cluster),), "?", answer, cluster)
        for place, cluster in enumerate(clusters)
    )


def said(question: str, method: str, budget: str, text: str, confidence: float = 1.0) -> Said:
    kept = FULL_TOKENS if budget == "full" else int(budget)
    return Said(question, method, budget, text, FULL_TOKENS, kept, kept + 5, 1, confidence, 0.1)


def records(answers: Sequence[Said], **run: Any) -> Records:
    settings = {"server": {"model": "demo"}}
    return Records(settings, {"default_method": "promprune", **run}, (), {each.key: each for each in answers})


def drawn(
    clusters: Sequence[int], rates: dict[str, Callable[[float], float]], seed: int
) -> tuple[tuple[Question, ...], Records]:
    """Answers at all tokens, and at budgets whose answers change with a rate that depends on their confidence."""
    chance = random.Random(seed)
    asked = questions(clusters)
    answers = [said(each.id, "full", "full", "yes") for each in asked]
    for budget, rate in rates.items():
        common = {cluster: chance.random() for cluster in clusters}  # an image's answers are alike
        for each in asked:
            confidence = chance.random() ** 0.2
            luck = common[each.cluster] if chance.random() < 0.5 else chance.random()
            changed = luck < rate(confidence)
            answers.append(said(each.id, "promprune", budget, "no" if changed else "yes", confidence))
    return asked, records(answers)


def png(colour: int = 0, size: tuple[int, int] = (80, 40)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(content, "PNG")
    return content.getvalue()


def url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def file_of(folder: Path, lines: Sequence[Any]) -> Path:
    """A file of questions, and the picture that they ask about."""
    (folder / "red.png").write_bytes(png(255))
    file = folder / "mine.jsonl"
    file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return file


class Server:
    """What a server with the plugin answers: pruned answers are ``no`` where the question asks for it.

    Args:
        any_size: Whether a smaller image has fewer tokens.
        audits: Whether it tells the log-probabilities of prompts.
        inspector: Whether it tells which tokens are kept.
        thinks: Whether it is cut off before it answers, unless the question is a hard one.
    """

    def __init__(
        self, *, any_size: bool = False, audits: bool = True, inspector: bool = True, thinks: bool = False
    ) -> None:
        self.any_size, self.audits, self.inspector, self.thinks = any_size, audits, inspector, thinks
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "image" in body:
            return self._inspected(body)
        each = [self._sent(part) for part in body["messages"][0]["content"][:-1]]
        seen, kept = sum(each), sum(self._kept(body, tokens) for tokens in each)
        usage = {"visual_tokens": {"seen": seen, "kept": kept}, "prompt_tokens": kept + 5, "completion_tokens": 2}
        if "prompt_logprobs" in body:
            if not self.audits:
                return 400, {"error": {"message": "no log-probabilities of prompts here"}}
            tokens = {"1": {"rank": 3, "logprob": -2.5}, "2": {"rank": 1, "logprob": -0.5}}
            usage["prompt_tokens"] += 1
            return 200, {"prompt_logprobs": [None, tokens], "usage": usage, "choices": []}
        changes = kept < seen and "hard" in body["messages"][0]["content"][-1]["text"]
        confidence = math.log(0.6 if changes else 0.999)
        token = {"logprob": confidence, "top_logprobs": [{"logprob": confidence}]}
        message = {"content": " no" if changes else " yes"}
        choice = {"message": message, "finish_reason": "stop", "logprobs": {"content": [token]}}
        if self.thinks and "hard" not in body["messages"][0]["content"][-1]["text"]:
            choice |= {"message": {"content": None}, "finish_reason": "length"}
        return 200, {"choices": [choice], "usage": usage}

    def _sent(self, part: dict[str, Any]) -> int:
        data = part["image_url"]["url"].partition(",")[2]
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            self.sizes.append(image.size)
            return self.tokens(*image.size)

    def tokens(self, width: int, height: int) -> int:
        """Tokens of an image."""
        return math.ceil(width / 4) * math.ceil(height / 4) if self.any_size else 200

    def _kept(self, body: dict[str, Any], seen: int) -> int:
        budget = Budget.parse(body["visual_token_budget"])
        assert budget is not None
        return min(seen, budget.of(seen))

    def _inspected(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not self.inspector:
            return 404, {"detail": "Not Found"}
        group = {"salient": None}
        boxes = [[0, 0, 40, 40], [40, 0, 80, 40]]
        return 200, {"width": 80, "height": 40, "seen": 2, "views": [0], "boxes": boxes} | {
            "indices": [0],
            "groups": [group],
        }
