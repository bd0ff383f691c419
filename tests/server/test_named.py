"""Images that a request names by their uuid and does not send: as stock vLLM without a budget, and with one."""

from __future__ import annotations

from typing import Any

import pytest

from promprune_vllm.demo.server import Server, is_healthy
from promprune_vllm.server.reply_headers import KEPT_HEADER, SEEN_HEADER
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import body, noise, post

pytestmark = pytest.mark.server
CHAT = "/v1/chat/completions"
HITS = "vllm:prefix_cache_hits"
TELLING = {"logprobs": True, "top_logprobs": 5, "return_token_ids": True}
VLLM_SAYS = "Cache miss for image at index 0 but data is not provided."


def sent(uuid: str, photo: str = "coffee", **fields: Any) -> dict[str, Any]:
    """A chat request whose image has a name; its prompt is its own, so that no other's blocks are hit."""
    request = body(photo, cache_salt=f"named {uuid}", **TELLING, **fields)
    request["messages"][0]["content"][0]["uuid"] = uuid
    return request


def named(request: dict[str, Any]) -> dict[str, Any]:
    """The same request without its images."""
    (message,) = request["messages"]
    parts = [{**part, "image_url": None} if "uuid" in part else part for part in message["content"]]
    return {**request, "messages": [{**message, "content": parts}]}


def answer(server: Server, request: dict[str, Any], path: str = CHAT) -> tuple[Any, ...]:
    """All that a reply says, but its own name and time; and how many tokens it found in the prefix cache."""
    before = server.metrics(HITS)[f"{HITS}_total"]
    response = post(server, path, request)
    assert response.status_code == 200, response.text
    found = {name: value for name, value in response.json().items() if name not in ("id", "created")}
    told = {name: response.headers.get(name) for name in (SEEN_HEADER, KEPT_HEADER)}
    return found, told, server.metrics(HITS)[f"{HITS}_total"] - before


def refusal(server: Server, request: dict[str, Any], path: str = CHAT) -> str:
    response = post(server, path, request)
    assert response.status_code == 400, response.text
    assert is_healthy(server.url)
    return str(response.json()["error"]["message"])


def test_without_a_budget_it_is_stock_vllm(server: Server, stock: Server) -> None:
    request = sent("mine")
    said = []
    for each in (server, stock):
        answer(each, request)
        again, by_name = answer(each, request), answer(each, named(request))
        assert by_name == again
        assert by_name[2] >= VISUAL_TOKENS, "cached tokens"
        said.append(by_name)
    (ours, told, hits), (theirs, _, their_hits) = said
    assert ours["usage"].pop("visual_tokens")["images"] == [{"seen": VISUAL_TOKENS, "kept": VISUAL_TOKENS}]
    assert told == {SEEN_HEADER: str(VISUAL_TOKENS), KEPT_HEADER: str(VISUAL_TOKENS)}
    assert (ours, hits) == (theirs, their_hits)


def test_what_stock_vllm_refuses_is_refused_in_its_words(server: Server, stock: Server) -> None:
    unknown = named(sent("never seen"))
    for path in (CHAT, "/tokenize"):
        request = unknown if path == CHAT else {name: unknown[name] for name in ("model", "messages")}
        assert refusal(server, request, path) == refusal(stock, request, path) == VLLM_SAYS


@pytest.mark.parametrize("budget", [64, "25%", 0.5, [64], {"total": 64}, "full", 5000, "auto"], ids=str)
def test_it_is_served_with_the_budget_it_was_sent_with(server: Server, budget: Any) -> None:
    request = sent(f"budget {budget}", visual_token_budget=budget)
    answer(server, request)
    again = answer(server, request)
    assert answer(server, named(request)) == again
    streamed = post(server, CHAT, named({**request, "stream": True}))
    assert streamed.status_code == 200
    assert '"error"' not in streamed.text


def test_another_budget_gets_one_sentence(server: Server) -> None:
    for budget in (64, "25%", [8], {"total": 9}, "auto"):
        if budget != "auto":  # which keeps everything here, as without a budget
            assert "does not know enough" in refusal(server, named(sent("never seen", visual_token_budget=budget)))
    request = sent("another", visual_token_budget=64)
    answer(server, request)
    again = answer(server, request)
    for budget in (None, "full", "auto", 63, "25%", [8], {"total": 9}):
        said = refusal(server, named({**request, "visual_token_budget": budget}))
        assert said.startswith(VLLM_SAYS)
        assert "uuid 'another' is not or no longer in the cache" in said
        assert "Send the image itself once" in said
    assert answer(server, named(request)) == again


def test_tokenize_has_images_of_its_own(server: Server) -> None:
    """As in stock vLLM: what chat has seen is not in the cache of these routes."""
    request = sent("count me", visual_token_budget=64)
    answer(server, request)
    asked = {name: request[name] for name in ("model", "messages", "visual_token_budget")}
    assert "does not know enough about uuid 'count me'" in refusal(server, named(asked), "/tokenize")
    counts = [post(server, "/tokenize", each).json()["count"] for each in (asked, named(asked))]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("budget", [None, 300])
def test_an_image_that_never_came_to_the_engine_is_asked_for(server: Server, budget: int | None) -> None:
    """vLLM alone answers with HTTP 500, as the API server takes for granted that the engine has the image."""
    photos = [noise(f"{budget}{i}") for i in range(8)]
    long = body(*photos, visual_token_budget=budget)
    for i, part in enumerate(long["messages"][0]["content"][:-1]):
        part["uuid"] = f"long {budget} {i}"
    assert "maximum" in refusal(server, long)  # context length: all of them are with the API server alone
    request = sent(f"long {budget} 0", photos[0], visual_token_budget=budget)
    assert refusal(server, named(request)).startswith(VLLM_SAYS)
    answer(server, request)
    again = answer(server, request)
    assert answer(server, named(request)) == again


def test_odd_names_are_names(server: Server) -> None:
    for uuid in ("", " ", "ü" * 500, "promprune-0", 7):
        request = sent("odd", visual_token_budget=64)
        request["messages"][0]["content"][0]["uuid"] = uuid
        answer(server, request)
        again = answer(server, request)
        assert answer(server, named(request)) == again
    assert is_healthy(server.url)
