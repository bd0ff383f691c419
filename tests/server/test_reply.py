"""What a reply tells of its images: in headers and ``usage``, on every route, and only where there are some."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from promprune_vllm.demo.server import Server
from promprune_vllm.server.reply_headers import KEPT_HEADER, SEEN_HEADER
from tests.conftest import QUESTION, VISUAL_TOKENS
from tests.server.conftest import MODEL, body, image_url, post

pytestmark = pytest.mark.server
CHAT = "/v1/chat/completions"
MIXED: dict[str, Any] = {"visual_token_budget": [64, "full"]}
BOTH = [{"seen": VISUAL_TOKENS, "kept": 64}, {"seen": VISUAL_TOKENS, "kept": VISUAL_TOKENS}]


def told(*kept: int) -> dict[str, Any]:
    images = [{"seen": VISUAL_TOKENS, "kept": each} for each in kept]
    return {"seen": VISUAL_TOKENS * len(kept), "kept": sum(kept), "images": images}


def headers(response: httpx.Response) -> tuple[str | None, str | None]:
    return response.headers.get(SEEN_HEADER), response.headers.get(KEPT_HEADER)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def responses_request(**fields: Any) -> dict[str, Any]:
    parts = [
        {"type": "input_image", "image_url": image_url("coffee"), "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    items = [{"role": "user", "content": parts}]
    return {"model": MODEL, "input": items, "max_output_tokens": 2, **fields}


def messages_request(**fields: Any) -> dict[str, Any]:
    media = {"type": "base64", "media_type": "image/jpeg", "data": image_url("coffee").partition(",")[2]}
    content = [{"type": "image", "source": media}, {"type": "text", "text": QUESTION}]
    return {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": content}], **fields}


def test_chat_tells_of_each_image_in_order(server: Server) -> None:
    response = post(server, CHAT, body("coffee", "rocket", **MIXED))
    usage = response.json()["usage"]
    assert usage["visual_tokens"] == {"seen": 2 * VISUAL_TOKENS, "kept": 64 + VISUAL_TOKENS, "images": BOTH}
    assert headers(response) == (str(2 * VISUAL_TOKENS), str(64 + VISUAL_TOKENS))
    plain = post(server, CHAT, body()).json()["usage"]["prompt_tokens"]
    assert usage["prompt_tokens"] - usage["visual_tokens"]["kept"] == pytest.approx(plain, abs=4)  # line ends


def test_a_request_that_asks_for_nothing_is_told_as_well(server: Server) -> None:
    response = post(server, CHAT, body("coffee"))
    assert response.json()["usage"]["visual_tokens"] == told(VISUAL_TOKENS)
    assert headers(response) == (str(VISUAL_TOKENS), str(VISUAL_TOKENS))


@pytest.mark.parametrize("continuous", [False, True])
def test_a_stream_tells_in_its_headers_and_wherever_it_has_a_usage(server: Server, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    response = post(server, CHAT, body("coffee", "rocket", **MIXED, stream=True, stream_options=options))
    assert headers(response) == (str(2 * VISUAL_TOKENS), str(64 + VISUAL_TOKENS))
    usages = [event["usage"] for event in events(response) if event.get("usage")]
    assert len(usages) == (len(events(response)) if continuous else 1)
    assert all(usage["visual_tokens"]["images"] == BOTH for usage in usages)


def test_a_stream_without_usage_still_has_the_headers(server: Server) -> None:
    response = post(server, CHAT, body("coffee", visual_token_budget=64, stream=True))
    assert headers(response) == (str(VISUAL_TOKENS), "64")
    assert "visual_tokens" not in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_responses_tell(server: Server, stream: bool) -> None:
    response = post(server, "/v1/responses", responses_request(visual_token_budget="25%", stream=stream))
    reply = events(response)[-1]["response"] if stream else response.json()
    assert reply["usage"]["visual_tokens"] == told(VISUAL_TOKENS // 4)
    assert headers(response) == (str(VISUAL_TOKENS), str(VISUAL_TOKENS // 4))


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_messages_tell(server: Server, stream: bool) -> None:
    request = messages_request(vllm_xargs={"visual_token_budget": 64}, stream=stream)
    response = post(server, "/v1/messages", request)
    if stream:
        start, *_, end, _ = events(response)
        usages = [start["message"]["usage"], end["usage"]]
    else:
        usages = [response.json()["usage"]]
    assert [usage["visual_tokens"] for usage in usages] == [told(64)] * len(usages)
    assert headers(response) == (str(VISUAL_TOKENS), "64")


def test_several_prompts_of_one_request_add_up(server: Server) -> None:
    chats = [body(photo)["messages"] for photo in ("coffee", "rocket")]
    request = body(visual_token_budget=32, max_tokens=1) | {"messages": chats}
    response = post(server, f"{CHAT}/batch", request)
    assert response.json()["usage"]["visual_tokens"] == told(32, 32)
    assert headers(response) == (str(2 * VISUAL_TOKENS), "64")


def test_tokenize_tells_in_its_headers(server: Server) -> None:
    request = {key: body("coffee")[key] for key in ("model", "messages")}
    response = post(server, "/tokenize", {**request, "visual_token_budget": 64})
    assert headers(response) == (str(VISUAL_TOKENS), "64")


def test_one_request_is_not_told_of_another(server: Server) -> None:
    """Two requests of one connection, one after the other."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        first = client.post(CHAT, json=body("coffee", visual_token_budget=64))
        second = client.post(CHAT, json=body("rocket", visual_token_budget=16))
        third = client.post(CHAT, json=body())
    assert [headers(each)[1] for each in (first, second, third)] == ["64", "16", None]
    assert second.json()["usage"]["visual_tokens"] == told(16)


REQUESTS: dict[str, dict[str, Any]] = {
    # Salted: both servers start from nothing, whatever earlier tests have left in their prefix caches.
    CHAT: body(logprobs=True, seed=1, cache_salt="whole"),
    # One token: of more, vLLM puts those into one chunk that came while it was busy.
    f"{CHAT} ": body(
        **{"cache_salt": "streamed", "max_tokens": 1, "stream": True},
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    ),
    "/v1/completions": {"model": MODEL, "prompt": ["one", "two"], "max_tokens": 2, "temperature": 0},
    "/v1/responses": {"model": MODEL, "input": "hello", "max_output_tokens": 2, "temperature": 0},
    "/v1/messages": {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]},
    "/tokenize": {"model": MODEL, "prompt": "hello"},
}


@pytest.mark.parametrize("path", REQUESTS)
def test_without_images_a_reply_is_stock_vllms(server: Server, stock: Server, path: str) -> None:
    """Byte for byte, but for what differs between any two replies."""

    def reply(of: Server) -> tuple[list[str], str]:
        response = post(of, path.strip(), REQUESTS[path] | {"temperature": 0})
        assert response.status_code == 200, response.text
        return sorted(set(response.headers) - {"content-length"}), _same(response.text)

    assert reply(server) == reply(stock)


def _same(text: str) -> str:
    """Take out what vLLM makes anew for every reply: ids and times."""
    changing = {"id", "created", "created_at", "completed_at", "system_fingerprint"}

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: None if key in changing else cleaned(each) for key, each in value.items()}
        return [cleaned(each) for each in value] if isinstance(value, list) else value

    lines = []
    for line in text.splitlines():
        start, brace, rest = line.partition("{")
        lines.append(f"{start}{json.dumps(cleaned(json.loads(brace + rest)))}" if brace else line)
    return "\n".join(lines)
