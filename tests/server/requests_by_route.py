"""A request with one image for each route of vLLM's servers that obeys a budget."""

from __future__ import annotations

from typing import Any

from tests.server.conftest import MODEL, image_url

IMAGE = {"type": "image_url", "image_url": {"url": image_url("coffee")}}
TEXT = {"type": "text", "text": "What is it?"}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": [IMAGE, TEXT]}]}
SHORT = {**CHAT, "max_tokens": 1, "temperature": 0}
SOURCE = {"type": "base64", "media_type": "image/jpeg", "data": image_url("coffee").partition(",")[2]}
COUNTED = {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image", "source": SOURCE}, TEXT]}]}
MESSAGES = {**COUNTED, "max_tokens": 1}
INPUT = [
    {"type": "input_image", "image_url": image_url("coffee"), "detail": "auto"},
    {**TEXT, "type": "input_text"},
]
RESPONSES = {"model": MODEL, "input": [{"role": "user", "content": INPUT}], "max_output_tokens": 1}
DOCUMENT = {"content": [IMAGE]}
SCORE = {"model": MODEL, "queries": "What is it?", "documents": [DOCUMENT]}
RERANK = {"model": MODEL, "query": "What is it?", "documents": [DOCUMENT]}
INSPECTED = {"image": image_url("coffee"), "text": "What is it?"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": SHORT,
    "/v1/chat/completions/batch": {**SHORT, "messages": [CHAT["messages"]]},
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNTED,
    "/tokenize": CHAT,
    "/invocations": SHORT,
    "/v1/chat/completions/render": SHORT,
    "/v1/messages/render": MESSAGES,
    "/v1/responses/render": RESPONSES,
    "/pooling": CHAT,
    "/v1/embeddings": CHAT,
    "/v2/embed": {"model": MODEL, "images": [image_url("coffee")], "embedding_types": ["float"]},
    "/score": SCORE,
    "/v1/score": SCORE,
    "/rerank": RERANK,
    "/v1/rerank": RERANK,
    "/v2/rerank": RERANK,
}
"""A request with one image for each route that obeys a budget."""
ELSEWHERE = {
    "/v1/systemone": "only for models with a read strategy; its images take the step that all prompts take",
    "/cohere/v2/chat": "needs Cohere's SDK",
    "/cohere/v2/chat/render": "needs Cohere's SDK",
    "/classify": "only for classifiers",
    "/inference/v1/generate": "has tests of its own below",
    "/v1/visual_tokens/count": "tests/server/test_routes.py",
    "/v1/visual_tokens/inspect": "tests/server/test_inspector.py",
}
"""Why a route that obeys has no request above."""
NO_USAGE = {"/tokenize", "/v2/embed", "/v1/messages/count_tokens"} | {path for path in BODIES if "render" in path}
