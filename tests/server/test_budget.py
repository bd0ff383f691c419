"""``visual_token_budget`` over HTTP: obeyed, refused in OpenAI's form, and neutral when unused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import OpenAI

from promprune_vllm.demo import PHOTOS
from promprune_vllm.demo.server import Server
from promprune_vllm.engine.compat import versions
from tests.conftest import QUESTION, VISUAL_TOKENS
from tests.server.conftest import MODEL, ask, body, image_url, post

pytestmark = pytest.mark.server
BAD = (
    "0",
    "-3",
    "1e12",
    "1000001",
    "64.5",
    '"064"',
    '"abc"',
    "true",
    "NaN",
    "{}",
    "[]",
    "[64.5]",
    '{"total": 0}',
    '{"per_frame": 0}',
    '"0%"',
)
LIMITS = "1000000"


def _prompt_tokens(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens"])


def _said(answer: dict[str, Any]) -> Any:
    """Token ids and log-probabilities, as the server computed them."""
    choice = answer["choices"][0]
    return choice["token_ids"], choice["logprobs"]


def test_chat_obeys(server: Server) -> None:
    full = _prompt_tokens(ask(server, "coffee"))
    for budget in (575, 64, 1):
        pruned = _prompt_tokens(ask(server, "coffee", visual_token_budget=budget))
        assert full - pruned == VISUAL_TOKENS - budget


def test_openai_sdk_obeys_on_chat_and_responses(server: Server) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        extra = {"visual_token_budget": 64}
        messages: Any = body("coffee")["messages"]
        chat = [
            client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, extra_body=e).usage
            for e in ({}, extra)
        ]
        parts: Any = [
            {"type": "input_image", "image_url": image_url("coffee"), "detail": "auto"},
            {"type": "input_text", "text": QUESTION},
        ]
        items: Any = [{"role": "user", "content": parts}]
        responses = [
            client.responses.create(model=MODEL, input=items, max_output_tokens=16, extra_body=e).usage
            for e in ({}, extra)
        ]
    assert chat[0].prompt_tokens - chat[1].prompt_tokens == VISUAL_TOKENS - 64
    assert responses[0].input_tokens - responses[1].input_tokens == VISUAL_TOKENS - 64


def test_vllm_xargs_obeys_on_chat_and_messages(server: Server) -> None:
    xargs = {"vllm_xargs": {"visual_token_budget": 64}}
    assert _prompt_tokens(ask(server, "coffee", **xargs)) == _prompt_tokens(
        ask(server, "coffee", visual_token_budget=64)
    )
    media = {"type": "base64", "media_type": "image/jpeg", "data": image_url("coffee").partition(",")[2]}
    content = [{"type": "image", "source": media}, {"type": "text", "text": QUESTION}]
    message = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
    lengths = [
        post(server, "/v1/messages", {**message, **more}).json()["usage"]["input_tokens"] for more in ({}, xargs)
    ]
    assert lengths[0] - lengths[1] == VISUAL_TOKENS - 64


def test_tokenize_counts_what_would_be_kept(server: Server) -> None:
    request = {key: body("coffee")[key] for key in ("model", "messages")}
    counts = [
        post(server, "/tokenize", {**request, **more}).json()["count"]
        for more in ({}, {"visual_token_budget": 64})
    ]
    assert counts[0] - counts[1] == VISUAL_TOKENS - 64


def test_same_value_twice_is_fine_and_a_contradiction_is_refused(server: Server) -> None:
    twice = {"visual_token_budget": 64, "vllm_xargs": {"visual_token_budget": 64}}
    assert ask(server, "coffee", **twice)
    response = post(
        server,
        "/v1/chat/completions",
        body("coffee", visual_token_budget=64, vllm_xargs={"visual_token_budget": 65}),
    )
    assert response.status_code == 400
    assert "64 at the top level and 65 in vllm_xargs" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (0.25, (144, 144)),
        ("25%", (144, 144)),
        ("64", (64, 64)),
        (64.0, (64, 64)),
        ("full", (576, 576)),
        ("auto", (576, 576)),
        ([64, "full"], (64, 576)),
        (["12.5%", 3], (72, 3)),
        ({"total": 100}, (50, 50)),
    ],
    ids=str,
)
def test_every_form_is_obeyed(server: Server, value: Any, kept: tuple[int, int]) -> None:
    full = _prompt_tokens(ask(server, "coffee", "rocket"))
    pruned = _prompt_tokens(ask(server, "coffee", "rocket", visual_token_budget=value))
    assert full - pruned == sum(VISUAL_TOKENS - count for count in kept)
    if not isinstance(value, dict):  # vLLM's own schema takes no object there
        nested = ask(server, "coffee", "rocket", vllm_xargs={"visual_token_budget": value})
        assert _prompt_tokens(nested) == pruned


@pytest.mark.parametrize(
    ("value", "photos"),
    [
        *(([64], 2), ([64, 64], 1), ([64], 0), ({"total": 1}, 2)),
        *(({"per_frame": 64}, 1), ([64, {"per_frame": 64}], 2)),
    ],
    ids=str,
)
def test_a_budget_for_other_images_than_there_are_gets_400(server: Server, value: Any, photos: int) -> None:
    request = body(*PHOTOS[:photos], visual_token_budget=value)
    response = post(server, "/v1/chat/completions", request)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "visual_token_budget"
    assert "image" in response.json()["error"]["message"]


@pytest.mark.parametrize("value", ["divprune", "nope", 7, True, ["promprune"]], ids=repr)
def test_a_method_the_server_does_not_allow_gets_400(server: Server, value: Any) -> None:
    assert ask(server, "coffee", visual_token_budget=9, visual_token_method="promprune")
    response = post(server, "/v1/chat/completions", body("coffee", visual_token_method=value))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "visual_token_method"
    assert "must be one of promprune" in error["message"]
    assert "--visual-token-allow-methods" in error["message"]


def test_null_is_no_budget(server: Server) -> None:
    assert _prompt_tokens(ask(server, "coffee", visual_token_budget=None)) == _prompt_tokens(ask(server, "coffee"))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("photos", [("coffee",), ()], ids=["image", "no image"])
def test_bad_values_get_400_in_openai_form(server: Server, value: str, photos: tuple[str, ...]) -> None:
    content = json.dumps(body(*photos)).removesuffix("}") + f', "visual_token_budget": {value}}}'
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=content,
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "visual_token_budget"
    assert error["type"] == "BadRequestError"
    sent = json.loads(value)
    assert repr(sent[0] if isinstance(sent, list) and sent else sent) in error["message"]
    assert LIMITS in error["message"]
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("value", [0, -3, 10**12, 64.5, "abc", [64.5]], ids=repr)
def test_bad_values_in_vllm_xargs_get_400_as_well(server: Server, value: Any) -> None:
    response = post(server, "/v1/chat/completions", body("coffee", vllm_xargs={"visual_token_budget": value}))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "visual_token_budget"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/completions", "/tokenize"])
def test_bad_values_get_400_on_the_other_routes(server: Server, path: str) -> None:
    request = {
        "/v1/responses": {"model": MODEL, "input": "hello"},
        "/v1/completions": {"model": MODEL, "prompt": "hello", "max_tokens": 1},
        "/tokenize": {"model": MODEL, "prompt": "hello"},
    }[path]
    good = post(server, path, {**request, "visual_token_budget": 64})
    assert good.status_code == 200, good.text
    refused = post(server, path, {**request, "visual_token_budget": "abc"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "visual_token_budget"


def test_a_request_without_images_may_carry_a_budget(server: Server) -> None:
    plain, budgeted = (
        ask(server, return_token_ids=True),
        ask(server, visual_token_budget=64, return_token_ids=True),
    )
    assert plain["choices"][0]["token_ids"] == budgeted["choices"][0]["token_ids"]
    assert plain["usage"] == budgeted["usage"]


def _routes() -> dict[str, dict[str, Any]]:
    """A request with a photograph, where the route takes one, for every route that comes to the processor."""
    chat = body("coffee")
    # vLLM 0.30 wants a detail here.
    image = {"type": "input_image", "image_url": image_url("coffee"), "detail": "auto"}
    parts = [image, {"type": "input_text", "text": QUESTION}]
    media = {"type": "base64", "media_type": "image/jpeg", "data": image_url("coffee").partition(",")[2]}
    content = [{"type": "image", "source": media}, {"type": "text", "text": QUESTION}]
    return {
        "/v1/chat/completions": chat,
        "/v1/chat/completions/batch": {**chat, "messages": [chat["messages"], chat["messages"]]},
        "/v1/responses": {"model": MODEL, "input": [{"role": "user", "content": parts}], "max_output_tokens": 16},
        "/v1/completions": {"model": MODEL, "prompt": "hello", "max_tokens": 1},
        "/tokenize": {key: chat[key] for key in ("model", "messages")},
        "/v1/messages": {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": content}]},
    }


SMUGGLED = [
    ("mm_processor_kwargs", {"visual_token_budget": 9}),
    ("mm_processor_kwargs", {"size": {"shortest_edge": 9}}),
    ("media_io_kwargs", {"image": {"do_resize": False}}),
]


@pytest.mark.parametrize("path", _routes())
@pytest.mark.parametrize(("field", "value"), SMUGGLED, ids=["our key", "a size", "media"])
def test_the_trust_gate_stays_shut(server: Server, stock: Server, path: str, field: str, value: Any) -> None:
    """Client-sent processor options get what they get from stock vLLM: refused, or not looked at."""
    if versions.before("0.31"):
        pytest.skip("this vLLM has no such gate")
    request = {**_routes()[path], field: value}
    theirs = post(stock, path, request)
    for more in ({}, {"visual_token_budget": 64}):
        ours = post(server, path, {**request, **more})
        assert ours.status_code == theirs.status_code
        if theirs.status_code == 400:
            assert ours.json() == theirs.json()
            assert field in ours.json()["error"]["message"]
    assert theirs.status_code == 400 or path in {"/v1/messages", "/v1/responses"}, (
        "these routes have no such field"
    )


@pytest.mark.parametrize("path", _routes())
def test_other_vllm_xargs_do_not_come_to_the_processor(server: Server, path: str) -> None:
    keys = ("size", "do_resize", "_promprune_plan", "_promprune_profile")
    plain, smuggling = (
        post(server, path, {**_routes()[path], **more}) for more in ({}, {"vllm_xargs": dict.fromkeys(keys, "9")})
    )
    assert plain.status_code == smuggling.status_code == 200, smuggling.text
    for usage in ("prompt_tokens", "input_tokens", "count"):
        assert _find(plain.json(), usage) == _find(smuggling.json(), usage)
    for key in ("visual_token_text", "visual_token_detail"):  # options of an offline program, and no fields
        refused = post(server, path, {**_routes()[path], "vllm_xargs": {key: "9"}})
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == key


def _find(answer: dict[str, Any], name: str) -> Any:
    return answer.get(name, (answer.get("usage") or {}).get(name))


@pytest.mark.parametrize("budget", [None, 576, 5000])
@pytest.mark.parametrize("photos", [("astronaut",), ("rocket", "coffee"), ()], ids=["one", "two", "none"])
def test_neutral_when_unused(server: Server, stock: Server, photos: tuple[str, ...], budget: int | None) -> None:
    """Without a budget, or with one that keeps everything, the answer is stock vLLM's bit for bit."""
    # Both from prefill: what is cached of earlier tests' prompts, and how sums then round, is chance.
    salt = f"neutral {photos} {budget}"
    telling = {"logprobs": True, "top_logprobs": 5, "return_token_ids": True, "max_tokens": 16, "cache_salt": salt}
    theirs = ask(stock, *photos, **telling)
    ours = ask(server, *photos, **telling, **({} if budget is None else {"visual_token_budget": budget}))
    assert _said(ours) == _said(theirs)
    assert _prompt_tokens(ours) == _prompt_tokens(theirs)


def test_concurrent_requests_answer_as_one_by_one(server: Server) -> None:
    """32 in flight: 4 images, mixed budgets and none, every cache on, an image longer than a step."""
    budgets = (None, 1, 16, 64, 65, 192, 576, 575)
    asks = [(photo, budget) for budget in budgets for photo in PHOTOS]
    telling = {"return_token_ids": True, "max_tokens": 8}

    def answer(request: tuple[str, int | None], **more: Any) -> list[int]:
        photo, budget = request
        fields = {} if budget is None else {"visual_token_budget": budget}
        ids: list[int] = ask(server, photo, **telling, **fields, **more)["choices"][0]["token_ids"]
        return ids

    # One salt a round: the first answers of each come from prefill, not from the other round's blocks.
    alone = [answer(request, cache_salt="alone") for request in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda request: answer(request, cache_salt="together"), asks))
        hot = list(pool.map(lambda request: answer(request, cache_salt="together"), asks))
    assert together == alone
    assert hot == alone
    assert len({tuple(ids) for ids in alone}) > len(PHOTOS), "budgets would make no difference to these answers"
