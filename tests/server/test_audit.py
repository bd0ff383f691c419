"""Answers that are audited, over HTTP: what is found is true, and nobody's answer or count changes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from promprune_vllm.demo.families import build_family_model
from promprune_vllm.demo.scenes import make_scene
from promprune_vllm.demo.server import Server
from promprune_vllm.demo.trained import TRAINED
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import Series, _serving, body, grown, noise, post, saved, series
from tests.server.requests_with_videos import TEXT, photo, video
from tests.server.test_escalation import ALWAYS, BUDGET, NEVER, ROUTES, content, usage
from tests.server.test_faults import until
from tests.server.test_reply import CHAT, events

pytestmark = [pytest.mark.server, pytest.mark.release]
AUDITS, ANSWERS = "promprune_audits_total", "promprune_audited_answers_total"
TOKENS, PROMPT_TOKENS = "promprune_audited_tokens_total", "promprune_audit_tokens_total"
BATCH = 4
REQUESTS = 24
OPTIONS = (
    *("--visual-token-audit", "100%", "--visual-token-feature-cache-gb", "0.1"),
    *("--max-num-seqs", str(BATCH)),
)
QUESTIONS = 30
SCENES = 6


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In the end it stops with an audit before it."""
    directory = tmp_path_factory.mktemp("audited")
    for server in _serving(TRAINED, directory, *OPTIONS):
        yield server
        assert post(server, CHAT, body(noise("the last"), **BUDGET)).status_code == 200
        log = server.log
    said = log.read_text()
    assert "The audit of an answer failed" not in said
    assert "was destroyed but it is pending" not in said


def results(changed: Series) -> dict[str, float]:
    return {key[1]: value for key, value in changed.items() if key[0] == AUDITS}


def after_audits(server: Server, before: Series, number: int = 1) -> Series:
    """What has changed once so many answers were audited, or not for a reason."""
    until(lambda: sum(results(grown(series(server), before)).values()) >= number)
    return grown(series(server), before)


def asked(server: Server, request: dict[str, Any]) -> tuple[dict[str, Any], Series]:
    """The reply to a request, and what has changed once its answer is audited."""
    before = series(server)
    reply = post(server, CHAT, request)
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told, after_audits(server, before)


def ids(reply: dict[str, Any]) -> Sequence[int]:
    found: Sequence[int] = reply["choices"][0]["token_ids"]
    return found


def agreeing(changed: Series, name: str = ANSWERS) -> float:
    return sum(value for key, value in changed.items() if key[0] == name and key[1] == "true")


def questions() -> Iterator[dict[str, Any]]:
    """About pictures that the model is good at, and with few tokens less so."""
    for seed in range(SCENES):
        scene = make_scene("scattered", 3000 + seed)
        url = saved(scene.image(), "PNG")
        for each in scene.questions()[: QUESTIONS // SCENES]:
            yield body(url, question=each.text, ignore_eos=False, return_token_ids=True)


def test_the_agreement_is_the_share_of_answers_that_are_the_same_with_all_tokens(audited: Server) -> None:
    same = []
    for request in questions():
        reply, changed = asked(audited, {**request, "visual_token_budget": 16})
        whole = ids(post(audited, CHAT, {**request, "visual_token_budget": "full"}).json())
        assert results(changed) == {"audited": 1}
        same.append(ids(reply) == whole)
        assert agreeing(changed) == same[-1]
        assert changed["promprune_audit_nats_count", "promprune"] == 1
        if same[-1]:
            assert agreeing(changed, TOKENS) == len(whole)
        assert {key[2] for key in changed if key[0] in (ANSWERS, TOKENS)} == {"12.5%"}
    assert len(same) == QUESTIONS
    assert 0 < sum(same) < QUESTIONS, "neither is there anything to find, or nothing to be found"


@pytest.mark.parametrize("budget", ["full", VISUAL_TOKENS, 100_000, None])
def test_an_answer_with_all_tokens_is_not_audited(audited: Server, budget: Any) -> None:
    before = series(audited)
    reply = post(audited, CHAT, body("coffee", visual_token_budget=budget))
    assert reply.status_code == 200
    _, changed = asked(
        audited, body("rocket", **BUDGET)
    )  # had there been one, it would have come before this one's
    assert results(grown(series(audited), before)) == results(changed) == {"audited": 1}


def test_what_an_audit_processes_is_counted_and_is_no_request(audited: Server) -> None:
    request = body("chelsea", **BUDGET)
    reply, changed = asked(audited, request)
    told = reply["usage"]
    whole = told["prompt_tokens"] + VISUAL_TOKENS - told["visual_tokens"]["kept"]
    assert changed[PROMPT_TOKENS,] == whole + told["completion_tokens"]
    assert sum(value for key, value in changed.items() if key[0] == "promprune_requests_total") == 1
    assert changed["promprune_visual_tokens_kept_total", "promprune", "image"] == told["visual_tokens"]["kept"]
    assert not any("none" in key for key in changed)


def test_what_the_inspector_asks_is_not_audited(audited: Server) -> None:
    before = series(audited)
    image = saved(make_scene("scattered", 3000).image(), "PNG")
    reply = post(audited, "/v1/visual_tokens/inspect", {"image": image, "text": "how many ?", **BUDGET})
    assert reply.json()["answer"]["text"]
    asked(audited, body("rocket", **BUDGET))
    assert results(grown(series(audited), before)) == {"audited": 1}


@pytest.mark.parametrize("name", ROUTES)
def test_an_answer_is_the_same_with_and_without_an_audit(audited: Server, every_method: Server, name: str) -> None:
    path, request = ROUTES[name]
    before = series(audited)
    replies = [post(server, path, {**request, **BUDGET}) for server in (audited, every_method)]
    assert content(path, replies[0]) == content(path, replies[1])
    if not path.endswith("batch"):
        assert usage(path, replies[0]) == usage(path, replies[1])
    prompts = 2 if path.endswith("batch") else 1
    assert results(after_audits(audited, before, prompts)) == {"audited": prompts}


def test_a_sampled_answer_agrees_in_part(audited: Server) -> None:
    before, tokens = series(audited), 0
    for seed in range(4):
        scene = make_scene("scattered", 3000 + seed)
        count = next(each for each in scene.questions() if each.task == "count")
        request = body(saved(scene.image(), "PNG"), question=count.text, temperature=2, seed=seed, max_tokens=3)
        tokens += asked(audited, {**request, "visual_token_budget": 4})[0]["usage"]["completion_tokens"]
    changed = grown(series(audited), before)
    assert sum(value for key, value in changed.items() if key[0] == TOKENS) == pytest.approx(tokens)
    assert 0 < agreeing(changed, TOKENS) < tokens
    assert agreeing(changed) % 1, "a probability"
    assert sum(value for key, value in changed.items() if key[0] == ANSWERS) == pytest.approx(4)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (NEVER, "12.5%"),
        ({"visual_token_escalate": {"below": 1, "to": 128}}, "25%"),
        (ALWAYS, None),
    ],
)
def test_what_was_answered_in_the_end_is_audited(audited: Server, fields: Any, kept: str | None) -> None:
    before, request = series(audited), body("astronaut", **BUDGET, **fields)
    if kept is not None:
        asked(audited, request)
    else:
        assert post(audited, CHAT, request).status_code == 200
    asked(audited, body("rocket", visual_token_budget=300))
    changed = grown(series(audited), before)
    assert {key[2] for key in changed if key[0] == ANSWERS} == {"100%", kept} - {None}
    assert results(changed) == {"audited": 1 + (kept is not None)}


def in_words(**fields: Any) -> dict[str, Any]:
    return body("coffee", **BUDGET, **fields)


def a_name_alone(server: Server) -> dict[str, Any]:
    """An image that the server has pruned, and never all of its tokens."""
    request = body(noise("named and audited"), **BUDGET)
    request["messages"][0]["content"][0]["uuid"] = "audited"
    asked(server, {**request, "n": 2, "temperature": 1})  # that is not audited
    request["messages"][0]["content"][0] = {"type": "image_url", "image_url": None, "uuid": "audited"}
    return request


@pytest.mark.parametrize(
    ("request_", "result"),
    [
        (in_words(n=2, temperature=1), "unsupported"),
        (body("coffee", "rocket", "chelsea", **BUDGET, max_tokens=350), "too_long"),
    ],
)
def test_why_an_answer_is_not_audited_is_counted(audited: Server, request_: dict[str, Any], result: str) -> None:
    _, changed = asked(audited, request_)
    assert results(changed) == {result: 1}
    assert not any(key[0] in (ANSWERS, TOKENS, PROMPT_TOKENS) for key in changed)


def test_an_image_that_cannot_be_had_in_full_is_refused(audited: Server) -> None:
    assert results(asked(audited, a_name_alone(audited))[1]) == {"refused": 1}


def test_a_client_that_leaves_leaves_no_audit(audited: Server) -> None:
    before = series(audited)
    request = body("coffee", **BUDGET, max_tokens=1000, stream=True)
    with httpx.stream("POST", f"{audited.url}{CHAT}", json=request, timeout=300) as reply:
        next(reply.iter_lines())
    assert results(after_audits(audited, before)) == {"unanswered": 1}
    assert results(asked(audited, body("coffee", **BUDGET))[1]) == {"audited": 1}


def test_while_requests_wait_there_are_no_audits(audited: Server) -> None:
    """Four run."""
    before, seen = series(audited), []

    def one(number: int) -> int:
        request = body(noise(f"load {number}"), **BUDGET, max_tokens=120)
        return post(audited, CHAT, request).status_code

    with ThreadPoolExecutor(REQUESTS) as pool:
        replies = [pool.submit(one, number) for number in range(REQUESTS)]
        while not all(reply.done() for reply in replies):
            now = audited.metrics()
            seen.append((now["vllm:num_requests_waiting"], now["promprune_audited_answers_total"]))
            time.sleep(0.05)
    assert {reply.result() for reply in replies} == {200}
    busy = [done for waiting, done in seen if waiting > BATCH]
    assert len(busy) > 1
    assert busy[-1] == busy[0], "audits ended while requests waited"
    counted = results(after_audits(audited, before, REQUESTS))
    assert counted.keys() <= {"audited", "busy", "no_space"}
    assert sum(counted.values()) == REQUESTS
    assert counted["no_space"] >= 1, "more answers ended in the meantime than may wait"


def test_the_state_tells_of_audits(audited: Server, every_method: Server) -> None:
    on, off = (httpx.get(f"{server.url}/v1/visual_tokens").json()["audit"] for server in (audited, every_method))
    assert on == {"on": True, "share": 1.0, "reason": None}
    assert off == {"on": False, "share": 0.0, "reason": None}


def test_a_server_without_the_option_audits_nothing(every_method: Server) -> None:
    assert post(every_method, CHAT, body("coffee", **BUDGET)).status_code == 200
    assert not any(value for key, value in series(every_method).items() if key[0].startswith("promprune_audit"))


def test_videos_and_a_server_of_several_processes(tmp_path: Path) -> None:
    """Each API server audits its own answers; clips keep their places in the prompt with all tokens."""
    model = build_family_model("qwen2_5_vl", tmp_path / "model")
    for server in _serving(model, tmp_path, "--visual-token-audit", "100%", "--api-server-count", "2"):
        for number in range(6):
            parts = [photo(noise(f"audit {number}")), video(), photo(), TEXT]
            request = {**body(return_token_ids=True), "messages": [{"role": "user", "content": parts}]}
            reply, changed = asked(server, {**request, "visual_token_budget": 12})
            whole = ids(post(server, CHAT, {**request, "visual_token_budget": "full"}).json())
            assert results(changed) == {"audited": 1}
            assert agreeing(changed) == (ids(reply) == whole)


def test_a_stream_is_audited_once_it_has_ended(audited: Server) -> None:
    before = series(audited)
    reply = post(audited, CHAT, body("coffee", **BUDGET, stream=True))
    assert len(events(reply)) > 1
    assert results(after_audits(audited, before)) == {"audited": 1}
