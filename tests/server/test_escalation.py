"""An answer that is asked for again, over HTTP: which one leaves, and what is told, refused and counted."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from promprune_vllm.demo.server import Server
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import Series, body, grown, post, series
from tests.server.test_faults import idle, until
from tests.server.test_reply import CHAT, events, headers, messages_request, responses_request

pytestmark = pytest.mark.server
FIRST = 32
BUDGET = {"visual_token_budget": FIRST}
ALWAYS, NEVER = {"visual_token_escalate": 1}, {"visual_token_escalate": 1e-9}
DISCARDED = "promprune_escalation_discarded_tokens_total"
LONG = 24


def content(route: str, reply: httpx.Response) -> Any:
    """What a client reads of an answer: the text, why it ended, and logprobs if it asked for some."""
    assert reply.status_code == 200, reply.text
    if reply.headers["content-type"].startswith("text/event-stream"):
        return _streamed(route, events(reply))
    answer = reply.json()
    if route == CHAT:
        choice = answer["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], choice["logprobs"]
    if route.endswith("batch"):
        return [choice["message"]["content"] for choice in answer["choices"]]
    if route == "/v1/responses":
        return answer["output"][0]["content"][0]["text"], answer["status"]
    return answer["content"][0]["text"], answer["stop_reason"]


def _streamed(route: str, sent: list[dict[str, Any]]) -> Any:
    """Where outputs come faster than they are read, vLLM sends several tokens at once: the texts are joined."""
    if route == CHAT:
        choices = [choice for event in sent for choice in event["choices"]]
        logprobs = [each for choice in choices if choice.get("logprobs") for each in choice["logprobs"]["content"]]
        return _text(choices), [choice["finish_reason"] for choice in choices][-1], logprobs
    if route == "/v1/responses":
        return "".join(event["delta"] for event in sent if event["type"] == "response.output_text.delta")
    return "".join(event["delta"]["text"] for event in sent if event["type"] == "content_block_delta")


def _text(choices: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def usage(route: str, reply: httpx.Response) -> dict[str, Any]:
    """A reply's usage, without what depends on what was asked before: the cached tokens."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        found: dict[str, Any] = reply.json()["usage"]
    else:
        sent = events(reply)
        if route == CHAT:
            found = next(event["usage"] for event in sent if event.get("usage"))
        elif route == "/v1/responses":
            found = next(event["response"]["usage"] for event in sent if event["type"] == "response.completed")
        else:
            found = next(event["usage"] for event in sent if event["type"] == "message_delta")
    return {name: value for name, value in found.items() if "details" not in name and "cache" not in name}


STREAM = {"stream": True, "stream_options": {"include_usage": True}}
BATCH = {**body("coffee"), "messages": [body("coffee")["messages"], body("rocket")["messages"]]}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, body("coffee", max_tokens=LONG)),
    "chat stream": (CHAT, body("coffee", max_tokens=LONG, **STREAM)),
    "chat with logprobs": (CHAT, body("coffee", logprobs=True, top_logprobs=0)),
    "chat stream with logprobs": (CHAT, body("coffee", logprobs=True, top_logprobs=3, **STREAM)),
    "two images": (CHAT, body("coffee", "rocket")),
    "a stop string": (CHAT, body("coffee", max_tokens=LONG, stop=["e", "a"])),
    "a seed": (CHAT, body("coffee", temperature=1.5, seed=11)),
    "a structured output": (CHAT, body("coffee", max_tokens=LONG, structured_outputs={"choice": ["red", "blue"]})),
    "batch": (f"{CHAT}/batch", BATCH),
    "responses": ("/v1/responses", responses_request(temperature=0)),
    "responses stream": ("/v1/responses", responses_request(temperature=0, stream=True)),
    "messages": ("/v1/messages", messages_request(temperature=0)),
    "messages stream": ("/v1/messages", messages_request(temperature=0, stream=True)),
}


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return ROUTES[request.param]


def decisions(before: Series, after: Series) -> dict[str, float]:
    changed = grown(after, before)
    return {key[1]: value for key, value in changed.items() if key[0] == "promprune_escalations_total"}


def test_an_unsure_answer_is_the_one_of_the_second_budget(server: Server, route: Any) -> None:
    path, request = route
    expected = post(server, path, {**request, "visual_token_budget": "full"})
    before = series(server)
    reply = post(server, path, {**request, **BUDGET, **ALWAYS})
    assert content(path, reply) == content(path, expected)
    if path.endswith("batch"):
        assert decisions(before, series(server)) == {"asked_again": 2}
        return
    told, wanted = usage(path, reply), usage(path, expected)
    (first,) = told["visual_tokens"].pop("first_tries")
    assert told == wanted
    assert first["asked_again"]
    assert 0 < first["confidence"] < 1
    images = len(told["visual_tokens"]["images"])
    assert first["kept"] == FIRST * images
    longer = images * (VISUAL_TOKENS - FIRST)
    spent = wanted.get("prompt_tokens", wanted.get("input_tokens"))
    assert first["prompt_tokens"] == spent - longer
    assert first["completion_tokens"] >= 1
    assert decisions(before, series(server)) == {"asked_again": 1}


def test_a_sure_answer_is_the_one_of_the_first_budget(server: Server, route: Any) -> None:
    path, request = route
    expected = post(server, path, {**request, **BUDGET})
    before = series(server)
    reply = post(server, path, {**request, **BUDGET, **NEVER})
    assert content(path, reply) == content(path, expected)
    prompts = 2 if path.endswith("batch") else 1
    if prompts == 1:
        told = usage(path, reply)
        (first,) = told["visual_tokens"].pop("first_tries")
        assert told == usage(path, expected)
        assert first == {"confidence": first["confidence"], "asked_again": False}
    assert decisions(before, series(server)) == {"sure": prompts}


def test_false_and_no_field_are_the_same_without_a_policy(server: Server) -> None:
    request = body("coffee", **BUDGET)
    without = post(server, CHAT, request).json()
    off = post(server, CHAT, {**request, "visual_token_escalate": False}).json()
    assert off["choices"] == without["choices"]
    assert off["usage"] == without["usage"]
    assert "first_tries" not in off["usage"]["visual_tokens"]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"visual_token_escalate": {"below": 1, "to": 128}}, [128, 128]),
        ({"visual_token_escalate": {"below": 1, "to": "25%"}}, [144, 144]),
        ({"visual_token_budget": [FIRST, "full"], "visual_token_escalate": {"below": 1, "to": 64}}, [64, 576]),
        ({"visual_token_budget": {"total": 40}, "visual_token_escalate": {"below": 1, "to": 30}}, [30, 30]),
    ],
)
def test_the_second_budget_is_of_each_image_and_never_less(
    server: Server, fields: dict[str, Any], kept: list[int]
) -> None:
    request = body("coffee", "rocket", **{**BUDGET, **fields})
    reply = post(server, CHAT, request)
    assert [image["kept"] for image in reply.json()["usage"]["visual_tokens"]["images"]] == kept
    assert headers(reply) == (str(2 * VISUAL_TOKENS), str(sum(kept)))
    direct = post(server, CHAT, body("coffee", "rocket", visual_token_budget=kept))
    assert content(CHAT, reply) == content(CHAT, direct)


@pytest.mark.parametrize("budget", ["full", VISUAL_TOKENS, 100])
def test_a_second_try_that_would_keep_no_more_is_none(server: Server, budget: Any) -> None:
    before = series(server)
    wish = {"visual_token_budget": budget, "visual_token_escalate": {"below": 1, "to": 64}}
    reply = post(server, CHAT, body("coffee", **wish))
    assert "first_tries" not in reply.json()["usage"]["visual_tokens"]
    assert decisions(before, series(server)) == {}


def test_a_streams_headers_tell_the_first_try(server: Server) -> None:
    reply = post(server, CHAT, body("coffee", **BUDGET, **ALWAYS, **STREAM))
    assert headers(reply) == (str(VISUAL_TOKENS), str(FIRST))
    assert usage(CHAT, reply)["visual_tokens"]["kept"] == VISUAL_TOKENS


def test_a_prompt_is_counted_once_and_what_was_thrown_away_by_itself(server: Server) -> None:
    before = series(server)
    (first,) = post(server, CHAT, body("chelsea", **BUDGET, **ALWAYS)).json()["usage"]["visual_tokens"][
        "first_tries"
    ]
    changed = grown(series(server), before)
    assert changed[DISCARDED, "prompt"] == first["prompt_tokens"]
    assert changed[DISCARDED, "visual"] == FIRST
    assert changed[DISCARDED, "answer"] == first["completion_tokens"]
    assert changed["promprune_answer_confidence_count",] == 1
    assert changed["promprune_requests_total", "full"] == 1
    assert changed["promprune_visual_tokens_seen_total", "none", "image"] == VISUAL_TOKENS
    assert not any("promprune" in key[1:] and key[0].startswith("promprune_visual") for key in changed)
    assert ("promprune_requests_total", "pruned") not in changed
    assert changed["promprune_budgets_total", "tokens"] == 1


def generated(server: Server) -> float:
    return sum(
        sample.value
        for family in server.families("vllm:generation_tokens")
        for sample in family.samples
        if sample.name == "vllm:generation_tokens_total"
    )


def test_the_first_try_ends_when_it_is_known_to_be_unsure(server: Server) -> None:
    """It would have gone on for as many tokens as the second."""
    before = generated(server)
    reply = post(server, CHAT, body("coffee", max_tokens=200, **BUDGET, **ALWAYS)).json()
    assert reply["usage"]["completion_tokens"] == 200
    thrown_away = generated(server) - before - 200
    assert 1 <= thrown_away <= 16, "a few steps until the abort arrives"


def test_a_longer_prompt_that_would_not_fit_is_not_tried(server: Server) -> None:
    photos = ("coffee", "rocket", "chelsea")  # 1,728 of 2,048 tokens
    before = series(server)
    reply = post(server, CHAT, body(*photos, max_tokens=400, ignore_eos=True, **BUDGET, **ALWAYS))
    assert reply.json()["usage"]["completion_tokens"] == 400
    assert reply.json()["usage"]["visual_tokens"]["kept"] == 3 * FIRST
    assert decisions(before, series(server)) == {"no_room": 1}


def test_without_a_limit_the_second_answer_has_the_room_that_is_left(server: Server) -> None:
    photos = ("coffee", "rocket", "chelsea")
    request = body(*photos, **BUDGET, **ALWAYS)
    del request["max_tokens"]
    told = post(server, CHAT, request).json()["usage"]
    assert told["visual_tokens"]["kept"] == 3 * VISUAL_TOKENS
    assert told["total_tokens"] == 2048


def test_an_image_that_is_named_and_cannot_be_had_in_full_keeps_its_first_answer(server: Server) -> None:
    named = body("coffee", **BUDGET)
    part = named["messages"][0]["content"][0]
    part["uuid"] = "escalated"
    expected = post(server, CHAT, named)
    part["image_url"] = None
    before = series(server)
    reply = post(server, CHAT, {**named, **ALWAYS})
    assert content(CHAT, reply) == content(CHAT, expected)
    assert reply.json()["usage"]["visual_tokens"]["kept"] == FIRST
    assert decisions(before, series(server)) == {"failed": 1}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 2, "temperature": 1}, "the request asks for 2 answers (n)"),
        ({"prompt_logprobs": 1}, "the request asks for prompt_logprobs"),
        ({"use_beam_search": True, "n": 2}, "beam search answers once"),
        ({"visual_token_escalate": 2}, "must be a probability above 0 and at most 1, got 2 (integer)"),
        ({"visual_token_escalate": {"window": 3}}, "an object with 'below', 'to' or both"),
    ],
)
def test_what_cannot_be_asked_again_is_refused(server: Server, fields: dict[str, Any], said: str) -> None:
    reply = post(server, CHAT, body("coffee", **{**BUDGET, "visual_token_escalate": True, **fields}))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert said in error["message"]
    assert error["param"] == "visual_token_escalate"
    if "visual_token_escalate" not in fields:
        once = post(server, CHAT, body("coffee", **{**BUDGET, **fields, "visual_token_escalate": False}))
        assert once.status_code == 200, once.text


PHOTOS = ("coffee", "rocket", "chelsea", "astronaut")
STREAMS = 200


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[tuple[str, bool], str]:
    """(photograph, asked again) -> the text of its stream."""
    answers = {}
    for photo in PHOTOS:
        for again, budget in ((False, FIRST), (True, "full")):
            reply = post(server, CHAT, body(photo, visual_token_budget=budget, stream=True))
            answers[photo, again] = _streamed(CHAT, events(reply))[0]
    return answers


def test_of_200_streams_with_random_cancels_every_answer_is_exact_and_nothing_stays(
    server: Server, expected: dict[tuple[str, bool], str]
) -> None:
    draw = random.Random(7)
    plans = [
        (draw.choice(PHOTOS), draw.random() < 0.5, draw.choice((None, None, 0, 1, 3))) for _ in range(STREAMS)
    ]
    before = series(server)

    async def one(client: httpx.AsyncClient, photo: str, again: bool, leave_after: int | None) -> str | None:
        fields = {**BUDGET, **(ALWAYS if again else NEVER), "stream": True}
        request = client.stream("POST", CHAT, json=body(photo, **fields), timeout=500)
        if leave_after == 0:  # before anything has come
            try:
                async with asyncio.timeout(draw.random()), request as reply:
                    await reply.aread()
            except TimeoutError:
                return None
            return None
        async with request as reply:
            assert reply.status_code == 200
            text = ""
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    text += _text(json.loads(line[6:])["choices"])
                if leave_after is not None and len(text) > leave_after:
                    return None
        return text

    async def all_of_them() -> list[str | None]:
        async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=STREAMS)) as client:
            return await asyncio.gather(*(one(client, *plan) for plan in plans))

    answers = asyncio.run(all_of_them())
    for (photo, again, leave_after), text in zip(plans, answers, strict=True):
        if leave_after is None:
            assert text == expected[photo, again]
    assert sum(text is not None for text in answers) > STREAMS // 4
    until(lambda: idle(server))
    counted = decisions(before, series(server))
    assert counted["asked_again"] >= sum(again and leave is None for _, again, leave in plans)
    assert set(counted) <= {"sure", "asked_again"}
    assert content(CHAT, post(server, CHAT, body("coffee", **BUDGET, **ALWAYS)))[0]


def test_tokens_are_counted_as_without_the_field(server: Server) -> None:
    """Routes that count take the same body; they count the first try."""
    request = {key: value for key, value in body("coffee", **BUDGET).items() if key in ("model", "messages")}
    for path in ("/tokenize", "/v1/messages/count_tokens"):
        asked = request if path == "/tokenize" else {**messages_request(), **BUDGET}
        counts = [post(server, path, {**asked, **fields}).json() for fields in ({}, ALWAYS)]
        assert counts[0] == counts[1]
