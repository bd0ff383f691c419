"""LiteLLM's proxy before a server, as deploy/litellm has it: what it lets through, what it renames, what it loses.

What it loses is tested too: when a new LiteLLM no longer does, docs/deployment.md can say so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from promprune_vllm.demo.server import Server, free_port
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import body, image_url
from tests.server.fronts import running
from tests.server.test_reply import messages_request

# `setup_env.py --litellm` fills it, and so does `make test-release`.
LITELLM = Path(sys.prefix) / "litellm-only"
pytestmark = [
    pytest.mark.server,
    pytest.mark.release,
    pytest.mark.skipif(
        not LITELLM.is_dir(), reason="no LiteLLM: python deploy/environment/setup_env.py --litellm"
    ),
]
CONFIG = Path(__file__).parents[2] / "deploy" / "litellm" / "config.yaml"
KEY = "sk-of-the-tests-and-as-long-as-litellm-wants-it"
KEPT = 20
PLAIN, NESTED = {"visual_token_budget": KEPT}, {"extra_body": {"visual_token_budget": KEPT}}
"""The ways to say a budget to LiteLLM: as to vLLM, and in a field that LiteLLM unpacks."""


@pytest.fixture(scope="module")
def proxy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the proxy with the configuration as it is, and a cache for requests that ask for one."""
    folder, port = tmp_path_factory.mktemp("litellm"), free_port()
    config = yaml.safe_load(CONFIG.read_text())
    config["litellm_settings"] |= {"cache": True, "cache_params": {"type": "local", "mode": "default_off"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    variables = {
        "PYTHONPATH": LITELLM,
        "LITELLM_MASTER_KEY": KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it looks for prices on the internet
        "VLLM_API_BASE": f"{server.url}/v1",
        "VLLM_API_KEY": "none",
    }
    python = getattr(sys, "_base_executable", sys.executable)  # nothing of our environment
    words = ["env", *(f"{name}={value}" for name, value in variables.items()), python, "-m"]
    words += ["litellm.proxy.proxy_cli", "--config", str(folder / "config.yaml")]
    url = f"http://127.0.0.1:{port}"
    words += ["--host", "127.0.0.1", "--port", str(port)]
    with running(words, log=folder / "log", ready=f"{url}/health/liveliness"):
        yield url


@pytest.fixture(scope="module")
def client(proxy: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key=KEY, max_retries=0, timeout=300) as opened:
        yield opened


def chat(client: openai.OpenAI, model: str = "demo", **fields: Any) -> tuple[dict[str, Any], str]:
    """The usage of a chat, and LiteLLM's name of our header."""
    messages: Any = body("coffee")["messages"]
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=4, extra_body=fields
    )
    usage = raw.parse().usage
    assert usage is not None
    return usage.model_dump(), raw.headers["llm_provider-x-visual-tokens-kept"]


def respond(client: openai.OpenAI, model: str = "demo", **fields: Any) -> tuple[dict[str, Any], str]:
    image = {"type": "input_image", "image_url": image_url("coffee"), "detail": "auto"}
    asked: Any = [{"role": "user", "content": [image, {"type": "input_text", "text": "What is it?"}]}]
    raw = client.responses.with_raw_response.create(
        model=model, input=asked, max_output_tokens=4, extra_body=fields
    )
    usage = raw.parse().usage
    assert usage is not None
    return usage.model_dump(), raw.headers["llm_provider-x-visual-tokens-kept"]


def message(proxy: str, **fields: Any) -> httpx.Response:
    request = {**messages_request(), "model": "demo", **fields}
    return httpx.post(f"{proxy}/v1/messages", json=request, headers={"x-api-key": KEY}, timeout=300)


@pytest.mark.parametrize("fields", [PLAIN, NESTED], ids=["plain", "nested"])
def test_a_chat_has_the_budget_and_says_what_was_kept(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    usage, header = chat(client, **fields)
    assert usage["visual_tokens"]["kept"] == KEPT
    assert usage["visual_tokens"]["seen"] == VISUAL_TOKENS
    assert header == str(KEPT)


def test_responses_need_the_budget_nested(client: openai.OpenAI) -> None:
    usage, header = respond(client, **NESTED)
    assert (usage["visual_tokens"]["kept"], header) == (KEPT, str(KEPT))
    usage, header = respond(client, **PLAIN)
    assert (usage["visual_tokens"]["kept"], header) == (VISUAL_TOKENS, str(VISUAL_TOKENS))


def test_messages_have_the_budget_and_do_not_say_so(proxy: str) -> None:
    full, *few = (message(proxy, **fields) for fields in ({}, PLAIN, NESTED))
    for each in few:
        spared = full.json()["usage"]["input_tokens"] - each.json()["usage"]["input_tokens"]
        assert spared == VISUAL_TOKENS - KEPT
        assert "visual_tokens" not in each.json()["usage"]
        assert not [name for name in each.headers if "visual-tokens" in name]


def test_a_name_has_a_budget_that_a_request_may_replace(client: openai.OpenAI, proxy: str) -> None:
    assert chat(client, "demo-64")[1] == respond(client, "demo-64")[1] == "64"
    assert chat(client, "demo-64", **PLAIN)[1] == respond(client, "demo-64", **NESTED)[1] == str(KEPT)
    tokens = [message(proxy, model=name).json()["usage"]["input_tokens"] for name in ("demo", "demo-64")]
    assert tokens[0] - tokens[1] == VISUAL_TOKENS - 64


def test_a_stream_has_the_header_and_no_count(client: openai.OpenAI) -> None:
    messages: Any = body("coffee")["messages"]
    raw = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=messages,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=PLAIN,
    )
    assert raw.headers["llm_provider-x-visual-tokens-kept"] == str(KEPT)
    (usage,) = (each.usage.model_dump() for each in raw.parse() if each.usage)
    assert usage["prompt_tokens"] == chat(client, **PLAIN)[0]["prompt_tokens"]
    assert "visual_tokens" not in usage


def test_refusals_arrive_as_such(client: openai.OpenAI, proxy: str) -> None:
    messages: Any = body("coffee")["messages"]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="visual_token_budget must be an integer") as refused:
            client.chat.completions.create(
                model="demo", messages=messages, stream=stream, extra_body={"visual_token_budget": 0}
            )
        assert refused.value.status_code == 400
        assert refused.value.param is None  # LiteLLM quotes ours in its own message
    with pytest.raises(openai.BadRequestError, match="visual_token_budget must be an integer"):
        respond(client, extra_body={"visual_token_budget": 0})
    reply = message(proxy, visual_token_budget=0)
    assert reply.status_code == 400
    assert "visual_token_budget must be an integer" in reply.json()["error"]["message"]


@pytest.mark.parametrize("nested", [False, True])
def test_its_cache_tells_budgets_apart(client: openai.OpenAI, nested: bool) -> None:
    """Only with the setting that the configuration has: LiteLLM's issue 42400."""

    def ask(budget: int) -> tuple[int, str | None]:
        fields = {"visual_token_budget": budget}
        messages: Any = body("coffee", question=f"Nested: {nested}?")["messages"]
        raw = client.chat.completions.with_raw_response.create(
            model="demo",
            messages=messages,
            max_tokens=4,
            extra_body={"cache": {"use-cache": True}, **({"extra_body": fields} if nested else fields)},
        )
        usage: Any = raw.parse().usage
        return usage.visual_tokens["kept"], raw.headers.get("x-litellm-cache-key")

    first, other, again = ask(KEPT), ask(30), ask(KEPT)
    assert [kept for kept, _ in (first, other, again)] == [KEPT, 30, KEPT]
    assert again[1], "the third is of the cache"
    assert not other[1]
