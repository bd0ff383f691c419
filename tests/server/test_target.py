"""A target instead of a budget, with the trained model: the server finds how many tokens are enough."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from promprune_vllm.core.target import SHARES
from promprune_vllm.demo.scenes import make_scene
from promprune_vllm.demo.server import Server
from promprune_vllm.demo.trained import TRAINED
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import _serving, body, grown, post, saved, series
from tests.server.test_faults import until
from tests.server.test_reply import CHAT

pytestmark = [pytest.mark.server, pytest.mark.release]
TARGET = 0.8
OPTIONS = ("--visual-token-target", f"{TARGET:.0%}", "--visual-token-audit", "100%", "--visual-token-floor", "1")
SMALLER = ("--visual-token-feature-cache-gb", "0.2")
SCENES = int(os.environ.get("PROMPRUNE_TARGET_SCENES", "60"))
ENOUGH = 230
"""Scenes, each with three questions, after which the demo model has settled: 8 minutes."""
TRAFFIC, HELD_OUT = range(4000, 4000 + SCENES), range(9000, 9030)


@pytest.fixture(scope="module")
def targeted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _serving(TRAINED, tmp_path_factory.mktemp("targeted"), *OPTIONS, *SMALLER)


def questions(seeds: range, each: int) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        scene = make_scene("scattered", seed)
        url = saved(scene.image(), "PNG")
        for question in scene.questions()[:each]:
            yield body(url, question=question.text, ignore_eos=False, return_token_ids=True)


def told(server: Server) -> dict[str, Any]:
    reply: dict[str, Any] = httpx.get(f"{server.url}/v1/visual_tokens").json()["target"]
    return reply


def asked(server: Server, request: dict[str, Any]) -> dict[str, Any]:
    reply = post(server, CHAT, request)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def test_it_settles_under_mixed_traffic_and_holds_on_other_questions(targeted: Server) -> None:
    assert [size["share"] for size in told(targeted)["sizes"]] == [1.0, 1.0, 1.0]
    before, shares = series(targeted), [1.0]
    for n, request in enumerate(questions(TRAFFIC, 3)):
        # Others ask for what they want; they are audited, and no evidence.
        own = {"visual_token_budget": 4} if n % 5 == 0 else {}
        asked(targeted, {**request, **own})
        audits = n + 1
        until(lambda done=audits: _audited(targeted, before) >= done)
        shares.append(told(targeted)["sizes"][0]["share"])
    changed = grown(series(targeted), before)
    assert changed["promprune_target_trials_total", "true", "1024"] > 30
    settled = shares[-1]
    assert settled < 1, "audits have proven nothing"
    assert {*shares} <= {float(share) for share in SHARES}
    if SCENES >= ENOUGH:
        assert {*shares[-len(shares) // 4 :]} == {settled}, "it still moves"
    assert [size["share"] for size in told(targeted)["sizes"]] == [settled, 1.0, 1.0], "other sizes were not seen"
    assert series(targeted)["promprune_target_share", "1024"] == settled
    same = []
    for request in questions(HELD_OUT, 4):
        found = asked(targeted, request)
        assert found["usage"]["visual_tokens"]["seen"] == VISUAL_TOKENS
        whole = asked(targeted, {**request, "visual_token_budget": "full"})
        same.append(found["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"])
    results = {key[1]: value for key, value in changed.items() if key[0] == "promprune_audits_total"}
    print(f"settled at {settled:.3f} of the tokens; {sum(same)} of {len(same)} other answers are unchanged")
    print(results)
    assert sum(same) / len(same) >= TARGET


def _audited(server: Server, before: Any) -> float:
    changed = grown(series(server), before)
    return sum(value for key, value in changed.items() if key[0] == "promprune_audits_total")
