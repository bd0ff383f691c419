"""Scenes and a server for the tests of the evaluation: no model, no vLLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from promprune_vllm.evaluation.records import Answer, Records

STATE: dict[str, Any] = {
    "version": "0.1",
    "vllm_version": "0.32.0",
    "model": "/models/demo",
    "architecture": "LlavaForConditionalGeneration",
    "prunable": True,
    "reason": None,
    "method": {"name": "promprune", "options": {"mu": 0.2}},
    "allowed_methods": [{"name": "promprune", "options": {"mu": 0.2}}, {"name": "random", "options": {"seed": 0}}],
}
SETTINGS = {"server": {name: STATE[name] for name in ("version", "vllm_version", "model", "architecture")}}
RUN = {"machine": "a machine", "cores": 2, "commit": "0123456789ab", "command": "promprune eval"}


@dataclass(frozen=True)
class Question:
    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """Two questions of each of two tasks, or one of one."""

    kind: str
    seed: int

    def image(self) -> Image.Image:
        return Image.new("RGB", (8, 8), (self.seed % 256, 0, 0))

    def questions(self) -> tuple[Question, ...]:
        if self.kind == "concentrated":
            return (Question("big-shape", "which shape ?", "star"),)
        return tuple(
            Question(task, f"{task} {self.seed} {i} ?", "yes") for task in ("presence", "count") for i in range(2)
        )


def draw(kind: str, seed: int, split: str) -> Scene:
    assert split == "held-out"
    return Scene(kind, seed)


def answers(
    method: str,
    budget: str,
    correct: Callable[[int, int], bool],
    *,
    images: int = 40,
    task: str = "presence",
    confidence: Callable[[int, int], float | None] = lambda *_: None,
) -> list[Answer]:
    """Two answers about each image; functions get the image and the question."""
    return [
        Answer(
            kind="scattered",
            seed=seed,
            index=index,
            task=task,
            method=method,
            budget=budget,
            question="?",
            expected="yes",
            said="yes" if correct(seed, index) else "no",
            correct=correct(seed, index),
            seen=576,
            kept={"full": 576, "25%": 144}.get(budget) or int(budget),
            seconds=0.1,
            confidence=confidence(seed, index),
        )
        for seed in range(images)
        for index in range(2)
    ]


def records(*groups: list[Answer]) -> Records:
    settings = {**SETTINGS, "scenes": {"split": "held-out", "fingerprint": "f"}}
    return Records(settings, (RUN,), {answer.key: answer for group in groups for answer in group})


Responder = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]
"""Says status and content; a status of 0 breaks the connection."""


def reply(
    body: dict[str, Any], said: str = "yes", sure: Sequence[Sequence[float]] = ((-0.5,),)
) -> tuple[int, dict[str, Any]]:
    """What a server with the plugin says to a question; ``sure`` is the top log-probabilities of each token."""
    budget = body["visual_token_budget"]
    kept = 576 if budget == "full" else budget
    usage = {"prompt_tokens": kept + 9, "visual_tokens": {"seen": 576, "kept": kept, "images": []}}
    tokens = [{"logprob": top[0], "top_logprobs": [{"logprob": each} for each in top]} for top in sure]
    return 200, {"choices": [{"message": {"content": said}, "logprobs": {"content": tokens}}], "usage": usage}


def fixed_tokens(width: int, height: int) -> int:
    """Tokens of an image on a tower that resizes it."""
    return 576


def native_tokens(width: int, height: int) -> int:
    """Tokens of an image on a tower of native resolution: one per 28 x 28 pixels, at least four."""
    return max(4, round(width / 28) * round(height / 28))


def counted(body: dict[str, Any], tokens: Callable[[int, int], int]) -> dict[str, Any]:
    """What the server's counting route says."""
    seen = [tokens(image["width"], image["height"]) for image in body["images"]]
    budget = body["visual_token_budget"]
    share = float(budget.rstrip("%")) / 100 if isinstance(budget, str) and "%" in budget else 1
    most = budget if isinstance(budget, int) else max(seen)
    return {"images": [{"seen": each, "kept": min(round(each * share), most)} for each in seen]}


@contextmanager
def server(
    respond: Responder = reply,
    *,
    state: dict[str, Any] | None = STATE,
    api_key: str | None = None,
    tokens: Callable[[int, int], int] | None = fixed_tokens,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on the loopback interface; yields its address and the bodies of the chat requests that it got.

    Without ``tokens``, it does not count images by their sizes.
    """
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if api_key is not None and self.headers.get("Authorization") != f"Bearer {api_key}":
                self._send(401, {"error": {"message": "no"}})
            elif self.path == "/v1/models":
                self._send(200, {"data": [{"id": "demo"}]})
            elif self.path == "/v1/visual_tokens" and state is not None:
                self._send(200, state)
            else:
                self._send(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/visual_tokens/count":
                self._send(404 if tokens is None else 200, {} if tokens is None else counted(body, tokens))
                return
            got.append(body)
            status, content = respond(body)
            if status:
                self._send(status, content)
            else:
                self.close_connection = True

        def _send(self, status: int, content: dict[str, Any]) -> None:
            raw = json.dumps(content).encode()
            with suppress(BrokenPipeError, ConnectionResetError):  # the client gave up on what was in flight
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        def log_message(self, *_: object) -> None: ...

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", got
    finally:
        running.shutdown()
        running.server_close()
        thread.join()
