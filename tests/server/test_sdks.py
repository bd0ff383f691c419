"""What users' libraries make of a budget and of its errors: OpenAI's, Anthropic's."""

from __future__ import annotations

from typing import Any

import anthropic
import openai
import pytest

from promprune_vllm.demo.server import Server
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import MODEL, body, noise
from tests.server.test_reply import messages_request

pytestmark = pytest.mark.server
KEPT = 20


def test_the_openai_sdk_raises_its_own_errors(server: Server, stock: Server) -> None:
    messages: Any = body("coffee")["messages"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="visual_token_budget must be") as refused:
                client.chat.completions.create(
                    model=MODEL, messages=messages, stream=stream, extra_body={"visual_token_budget": -5}
                )
            assert (refused.value.param, refused.value.type) == ("visual_token_budget", "BadRequestError")
            assert refused.value.status_code == 400
    for each in (server, stock):
        with (
            openai.OpenAI(base_url=f"{each.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.NotFoundError, match="`nobody` does not exist"),
        ):
            client.chat.completions.create(
                model="nobody", messages=messages, extra_body={"visual_token_budget": KEPT}
            )


@pytest.mark.release
def test_the_anthropic_sdk_obeys_and_raises_its_own_errors(server: Server, stock: Server) -> None:
    request: Any = messages_request()
    # A picture of this test's own: nothing of the prompt is cached on either server.
    media = {"type": "base64", "media_type": "image/png", "data": noise("anthropic").partition(",")[2]}
    request["messages"][0]["content"][0]["source"] = media

    def told(of: Server, extra_body: dict[str, Any] | None = None, **fields: Any) -> Any:
        # The SDK has no argument for the temperature any more; without it, answers are drawn.
        more = {"temperature": 0, **(extra_body or {})}
        with anthropic.Anthropic(base_url=of.url, api_key="none", max_retries=0) as client:
            return client.messages.create(**{**request, **fields}, extra_body=more)

    full = told(server)
    assert full.content == told(stock).content
    few = told(server, extra_body={"visual_token_budget": KEPT})
    assert full.usage.input_tokens - few.usage.input_tokens == VISUAL_TOKENS - KEPT
    assert few.usage.visual_tokens["kept"] == KEPT
    with pytest.raises(anthropic.BadRequestError) as theirs:
        told(stock, extra_body={"temperature": "hot"})
    with pytest.raises(anthropic.BadRequestError, match="visual_token_budget must be") as ours:
        told(server, extra_body={"visual_token_budget": -5})
    body_of = (theirs.value.body, ours.value.body)
    assert [sorted(each) for each in body_of] == [sorted(body_of[0])] * 2
    for each in (server, stock):
        with pytest.raises(anthropic.NotFoundError, match="`nobody` does not exist"):
            told(each, model="nobody", extra_body={"visual_token_budget": KEPT})
