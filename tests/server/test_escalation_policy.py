"""A server whose operator has answers asked for again: plain requests are, a request may say otherwise.

Its feature cache makes the second try free of the vision encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from promprune_vllm.demo.server import Server
from tests.conftest import QUESTION, VISUAL_TOKENS
from tests.server.conftest import Series, _serving, body, grown, image_url, post, series
from tests.server.test_escalation import content
from tests.server.test_reply import CHAT

pytestmark = [pytest.mark.server, pytest.mark.release]
OPTIONS = (
    *("--visual-token-budget", "32", "--visual-token-escalate", "1", "--visual-token-escalate-to", "128"),
    *("--visual-token-escalate-window", "4", "--visual-token-feature-cache-gb", "0.05"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
COLOR = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": COLOR}}
CHOICE = {"type": "function", "function": {"name": "paint"}}


@pytest.fixture(scope="module")
def asking(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _serving(demo_model, tmp_path_factory.mktemp("asking"), *OPTIONS)


def told(server: Server, *photos: str, **fields: Any) -> dict[str, Any]:
    reply = post(server, CHAT, body(*photos, **fields))
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["usage"]["visual_tokens"]
    return found


def encoder_calls(changed: Series) -> float:
    return changed.get(("promprune_encoder_batch_tokens_count",), 0)


def test_the_state_tells_the_policy(asking: Server) -> None:
    state = httpx.get(f"{asking.url}/v1/visual_tokens").json()
    assert state["escalation"] == {"on": True, "below": 1.0, "to": 128, "window": 4, "reason": None}


@pytest.mark.parametrize(
    ("fields", "kept", "asked_again"),
    [
        ({}, 128, True),
        ({"visual_token_escalate": True}, 128, True),
        ({"visual_token_escalate": False}, 32, None),
        ({"visual_token_escalate": 1e-9}, 32, False),
        ({"visual_token_escalate": {"to": "full"}}, VISUAL_TOKENS, True),
        ({"visual_token_budget": 200}, 200, None),
        ({"visual_token_budget": 64}, 128, True),
    ],
)
def test_a_request_may_say_otherwise(
    asking: Server, fields: dict[str, Any], kept: int, asked_again: bool | None
) -> None:
    usage = told(asking, "coffee", **fields)
    assert usage["kept"] == kept
    assert [each["asked_again"] for each in usage.get("first_tries", [])] == (
        [] if asked_again is None else [asked_again]
    )


def test_n_answers_are_given_once_where_the_client_did_not_ask_for_more(asking: Server) -> None:
    usage = told(asking, "coffee", n=2, temperature=1, seed=3)
    assert usage["kept"] == 32
    assert "first_tries" not in usage


def test_the_second_try_costs_no_encoding(asking: Server) -> None:
    before = series(asking)
    assert told(asking, "rocket")["kept"] == 128
    changed = grown(series(asking), before)
    assert encoder_calls(changed) == 1
    assert changed["promprune_feature_store_images_total", "hit"] == 1
    assert changed["promprune_feature_store_images_total", "miss"] == 1
    assert changed["promprune_escalations_total", "asked_again"] == 1


def test_an_answer_from_stored_rows_is_the_answer(asking: Server, server: Server) -> None:
    """Compared with a server that encodes the image for this budget alone."""
    stored = post(asking, CHAT, body("chelsea", max_tokens=12))
    fresh = post(server, CHAT, body("chelsea", max_tokens=12, visual_token_budget=128))
    assert content(CHAT, stored) == content(CHAT, fresh)


def test_a_request_with_tools_gets_the_message_of_the_second_answer(asking: Server) -> None:
    def message(**fields: Any) -> Any:
        reply = post(asking, CHAT, body("coffee", max_tokens=24, tools=[TOOL], tool_choice=CHOICE, **fields))
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"]

    assert message() == message(visual_token_budget=128, visual_token_escalate=False)


def test_the_inspector_shows_the_tokens_of_the_first_budget(asking: Server) -> None:
    """Its own request for them must not be asked again; that of the question is."""
    inspected = {"image": image_url("coffee"), "text": QUESTION}
    reply = httpx.post(f"{asking.url}/v1/visual_tokens/inspect", json=inspected, timeout=300).json()
    assert (reply["kept"], len(reply["indices"])) == (32, 32)
    assert reply["answer"]["first"]["kept"] == 32
    assert reply["answer"]["kept"] == 128
