"""The inspector's answer to a question: how sure the model is, and what a client gets if it is not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from promprune_vllm.demo.scenes import make_scene
from promprune_vllm.demo.server import Server
from promprune_vllm.engine.api_server.inspected_answer import ANSWER_TOKENS
from tests.server.conftest import MODEL, grown, image_url, post, saved, series

pytestmark = [pytest.mark.server, pytest.mark.release]
INSPECT = "/v1/visual_tokens/inspect"
ESCALATE = "visual_token_escalate"
QUESTION = "What is on the table?"
FULL, KEPT = 576, 64


def look(server: Server, **fields: Any) -> dict[str, Any]:
    response = post(server, INSPECT, {"image": image_url("coffee"), "visual_token_budget": KEPT, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["x-visual-tokens-kept"] == str(response.json()["kept"]), "of what is inspected"
    told: dict[str, Any] = response.json()
    return told


def chat(server: Server, **fields: Any) -> dict[str, Any]:
    """What a client gets that asks the same, greedily."""
    content = [
        {"type": "image_url", "image_url": {"url": image_url("coffee")}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": ANSWER_TOKENS}
    response = post(server, "/v1/chat/completions", {**body, "temperature": 0, "repetition_penalty": 1, **fields})
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def test_an_unsure_answer_is_shown_beside_the_one_that_a_client_gets(server: Server) -> None:
    before = series(server)
    told = look(server, text=QUESTION, **{ESCALATE: {"below": 0.9, "to": 300}})
    answer, first = told["answer"], told["answer"]["first"]
    assert grown(series(server), before)["promprune_escalations_total", "asked_again"] == 1
    assert (told["kept"], first["kept"], answer["kept"], answer["below"]) == (KEPT, KEPT, 300, 0.9)
    assert first["confidence"] < 0.9
    assert answer["prompt_tokens"] - first["prompt_tokens"] == 300 - KEPT
    for tried, fields in (
        (first, {"visual_token_budget": KEPT, ESCALATE: False}),
        (answer, {"visual_token_budget": 300, ESCALATE: False}),
        (answer, {"visual_token_budget": KEPT, ESCALATE: {"below": 0.9, "to": 300}}),
    ):
        reply = chat(server, **fields)
        assert tried["text"] == reply["choices"][0]["message"]["content"]
        assert tried["completion_tokens"] == reply["usage"]["completion_tokens"]
    (counted,) = reply["usage"]["visual_tokens"]["first_tries"]
    assert (counted["asked_again"], counted["kept"]) == (True, KEPT)
    likeliest = _likeliest(server, visual_token_budget=KEPT)
    assert first["confidence"] == pytest.approx(min(likeliest[:16]), abs=1e-5)
    assert counted["confidence"] == pytest.approx(min(likeliest[: counted["completion_tokens"]]), abs=1e-5)


def _likeliest(server: Server, **fields: Any) -> list[float]:
    """The probability of the likeliest token at each place of an answer that is not asked again."""
    (choice,) = chat(server, logprobs=True, top_logprobs=2, **fields, **{ESCALATE: False})["choices"]
    tops = [[each["logprob"] for each in token["top_logprobs"]] for token in choice["logprobs"]["content"]]
    assert len(tops) == ANSWER_TOKENS
    return [math.exp(max(top)) for top in tops]


def test_a_sure_answer_stands(server: Server) -> None:
    before = series(server)
    answer = look(server, text=QUESTION, **{ESCALATE: 1e-9})["answer"]
    assert (answer["first"], answer["below"], answer["kept"]) == (None, 1e-9, KEPT)
    assert 1e-9 < answer["confidence"] < 0.9
    assert ("promprune_escalations_total", "sure") not in grown(series(server), before), "nobody was asked again"


def test_where_no_answer_is_asked_again_only_its_confidence_is_told(server: Server) -> None:
    for fields in ({}, {ESCALATE: False}, {ESCALATE: None}):
        answer = look(server, text=QUESTION, **fields)["answer"]
        assert (answer["first"], answer["below"], answer["kept"]) == (None, None, KEPT)
        assert 0 < answer["confidence"] < 0.9


def test_an_answer_with_all_tokens_has_no_second_try(server: Server) -> None:
    answer = look(server, text=QUESTION, visual_token_budget="full", **{ESCALATE: True})["answer"]
    assert (answer["first"], answer["below"], answer["kept"]) == (None, 0.9, FULL)
    assert answer["confidence"] < 0.9


def test_without_a_question_there_is_no_answer(server: Server) -> None:
    for fields in ({}, {"text": ""}, {"text": QUESTION, "answer": False}):
        before = server.metrics("vllm:generation_tokens")
        assert look(server, **fields)["answer"] is None
        after = server.metrics("vllm:generation_tokens")
        assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 1
        refused = post(server, INSPECT, {"image": image_url("coffee"), **fields, ESCALATE: True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, ESCALATE)
        assert "no question" in refused.json()["error"]["message"]
    wrong = post(server, INSPECT, {"image": image_url("coffee"), "text": QUESTION, ESCALATE: 2})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, ESCALATE)


def test_a_model_that_answers_is_surer_of_what_it_sees(every_method: Server) -> None:
    scene = make_scene("scattered", 3)
    question = next(each for each in scene.questions() if each.task == "digit")
    image = saved(scene.image(), "PNG")
    told = look(every_method, image=image, text=question.text, **{ESCALATE: 0.5})
    assert told["answer"]["text"].strip() == question.answer
    assert told["answer"]["first"] is None
    assert told["answer"]["confidence"] > 0.5
