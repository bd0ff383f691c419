"""Options of vLLM's that a budget must live with, all on one server, and on a stock one beside it.

Qwen2.5-VL behind a path and an API key, with a LoRA adapter on its language model, n-gram speculation, steps of 48
tokens, a processor cache in shared memory and limits of the operator's on the pixels of an image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import httpx
import openai
import pytest
import torch
from safetensors.torch import save_file

from promprune_vllm.demo.families import build_family_model
from promprune_vllm.demo.server import Server
from tests.server.conftest import MODEL, _serving, body, grown, saved, series
from tests.server.test_kept_right import TURNS, salt, told_by, turned, upright
from tests.server.test_reply import messages_request

pytestmark = [pytest.mark.server, pytest.mark.release]
CHAT, COUNT = "/v1/chat/completions", "/v1/visual_tokens/count"
KEPT = 9
KEY, PREFIX = {"authorization": "Bearer secret"}, "/models"
TOKEN_PX = 28 * 28
LEAST, MOST = 32, 64
"""Visual tokens of the smallest and of the largest image that the operator lets in."""
SMALL, LARGE = (56, 56), (840, 560)


def adapter(directory: Path) -> Path:
    """A LoRA adapter as PEFT saves it, on the queries and values of each layer of the language model."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(4):
        for projection, rows in (("q_proj", 128), ("v_proj", 64)):
            name = f"base_model.model.model.language_model.layers.{layer}.self_attn.{projection}.lora"
            weights[f"{name}_A.weight"] = torch.randn(4, 128, generator=generator) / 128**0.5
            weights[f"{name}_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


class Pair(NamedTuple):
    """Our server and a stock one, with the same options."""

    ours: Server
    stock: Server

    def ask(self, request: dict[str, Any], path: str = f"{PREFIX}{CHAT}") -> httpx.Response:
        """Ask both, and return our reply, which says what stock's says."""
        salted = {**request, "cache_salt": salt(request)}
        theirs, ours = (post(each, path, salted) for each in (self.stock, self.ours))
        assert ours.status_code == theirs.status_code, ours.text
        assert told_by(ours) == told_by(theirs)
        return ours


def post(server: Server, path: str, request: Any, headers: Any = KEY) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=request, headers=headers, timeout=300)


def pruned(server: Server, request: dict[str, Any], budget: Any = KEPT) -> dict[str, Any]:
    response = post(server, f"{PREFIX}{CHAT}", {**request, "visual_token_budget": budget})
    assert response.status_code == 200, response.text
    assert response.headers["x-visual-tokens-kept"] == str(budget)
    reply: dict[str, Any] = response.json()
    assert reply["usage"]["visual_tokens"]["kept"] == budget
    return reply


def options(directory: Path) -> tuple[str, ...]:
    """What both servers are started with."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    pixels = {"min_pixels": LEAST * TOKEN_PX, "max_pixels": MOST * TOKEN_PX}
    return (
        *("--root-path", PREFIX, "--api-key", "secret", "--max-num-batched-tokens", "48", "--max-num-seqs", "8"),
        *("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapted={adapter(directory / 'adapter')}"),
        *("--speculative-config", json.dumps(speculation), "--mm-processor-cache-type", "shm"),
        *("--mm-processor-kwargs", json.dumps(pixels)),
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("options")
    model = build_family_model("qwen2_5_vl", directory / "model")
    more = options(directory)
    serve = contextmanager(_serving)
    # Of its own for each: where vLLM was imported before, both would inherit one.
    memory = "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME"
    with (
        serve(model, tmp_path_factory.mktemp("ours"), *more, **{memory: f"ours-{os.getpid()}"}) as ours,
        serve(
            model,
            tmp_path_factory.mktemp("theirs"),
            *more,
            **{memory: f"theirs-{os.getpid()}", "VLLM_PLUGINS": ""},
        ) as stock,
    ):
        yield Pair(ours, stock)


def picture(size: tuple[int, int]) -> str:
    return saved(upright(*size), "PNG")


def test_an_adapter_on_the_language_model_answers_with_a_budget(pair: Pair) -> None:
    words = set()
    for model in (MODEL, "adapted"):
        request = body(picture(LARGE), return_token_ids=True, max_tokens=12, model=model)
        full, few = pair.ask(request).json(), pruned(pair.ours, request)
        assert few["model"] == full["model"] == model
        words |= {tuple(each["choices"][0]["token_ids"]) for each in (full, few)}
    assert len(words) == 4, "the adapter and the budget should each change the answer"


@pytest.mark.parametrize("budget", [None, KEPT, 40])
def test_speculated_tokens_in_small_steps_are_those_of_the_model(pair: Pair, budget: int | None) -> None:
    """What was drafted from n-grams is what the same server says of the finished text, token by token."""
    drafts = pair.ours.metrics("vllm:spec_decode")["vllm:spec_decode_num_drafts_total"]
    request = body(picture(LARGE), question="aba aba aba", max_tokens=40, return_token_ids=True)
    reply = (pair.ask(request).json() if budget is None else pruned(pair.ours, request, budget))["choices"][0]
    assert pair.ours.metrics("vllm:spec_decode")["vllm:spec_decode_num_drafts_total"] > drafts
    ids = reply["token_ids"]
    said = {"role": "assistant", "content": reply["message"]["content"]}
    again = {**request, "messages": [*request["messages"], said], "prompt_logprobs": 1, "max_tokens": 1}
    again |= {"add_generation_prompt": False, "continue_final_message": True}
    finished = (pair.ask(again).json() if budget is None else pruned(pair.ours, again, budget))["prompt_logprobs"]
    for token, at in zip(ids, finished[-len(ids) :], strict=True):
        assert at[str(token)]["rank"] == 1


def test_a_cache_in_shared_memory_holds_an_image_for_each_budget(pair: Pair) -> None:
    request = body(picture((300, 200)), return_token_ids=True)
    request["messages"][0]["content"][0]["uuid"] = "in shared memory"
    pair.ask(request)
    named = json.loads(json.dumps(request))
    named["messages"][0]["content"][0]["image_url"] = None
    for budget in (KEPT, 3, KEPT):
        sent = pruned(pair.ours, request, budget)["choices"]
        assert pruned(pair.ours, request, budget)["choices"] == sent
        assert pruned(pair.ours, named, budget)["choices"] == sent
    pair.ask(named)


@pytest.mark.parametrize(("size", "seen"), [(SMALL, range(LEAST, MOST)), (LARGE, range(LEAST, MOST + 1))])
def test_a_budget_is_of_the_tokens_that_are_left_by_limits_on_pixels(
    pair: Pair, size: tuple[int, int], seen: range
) -> None:
    request = body(picture(size))
    full, few = pair.ask(request).json()["usage"], pruned(pair.ours, request)["usage"]
    tokens = full["visual_tokens"]["seen"]
    assert tokens in seen
    assert full["prompt_tokens"] - few["prompt_tokens"] == tokens - KEPT
    images = [{"width": size[0], "height": size[1]}]
    counted = post(pair.ours, f"{PREFIX}{COUNT}", {"images": images, "visual_token_budget": KEPT}).json()
    assert (counted["seen"], counted["kept"]) == (tokens, KEPT)


def clip() -> dict[str, Any]:
    """A question about a video of four pictures, which the model merges into two frames."""
    pictures = (saved(upright(112, 84).rotate(90 * i), "JPEG").partition(",")[2] for i in range(4))
    request = body(return_token_ids=True)
    video = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(pictures)}"}}
    request["messages"][0]["content"].insert(0, video)
    return request


def test_a_video_that_keeps_its_tokens_is_answered_as_stock_answers(pair: Pair) -> None:
    whole = pair.ask(clip())
    full = post(pair.ours, f"{PREFIX}{CHAT}", {**clip(), "visual_token_budget": "full"})
    assert full.status_code == 200, full.text
    assert full.json()["choices"] == whole.json()["choices"]
    for each in (whole, full):
        used = each.json()["usage"]["visual_tokens"]
        assert used["images"] == []
        assert used["videos"] == [{"seen": used["seen"], "kept": used["seen"]}]


def test_a_budget_is_of_the_video_or_of_each_of_its_frames(pair: Pair) -> None:
    whole = pair.ask(clip()).json()["usage"]
    seen = whole["visual_tokens"]["seen"]
    before = series(pair.ours)
    for budget, kept in ((KEPT, KEPT), ({"per_frame": 3}, 6), ([{"per_frame": 1}], 2), ({"total": 5}, 5)):
        response = post(pair.ours, f"{PREFIX}{CHAT}", {**clip(), "visual_token_budget": budget})
        assert response.status_code == 200, response.text
        assert response.headers["x-visual-tokens-kept"] == str(kept)
        used = response.json()["usage"]
        assert used["visual_tokens"]["videos"] == [{"seen": seen, "kept": kept}]
        assert whole["prompt_tokens"] - used["prompt_tokens"] == seen - kept
    counted = grown(series(pair.ours), before)
    assert counted["promprune_visual_tokens_seen_total", "promprune", "video"] == 4 * seen
    assert counted["promprune_visual_tokens_kept_total", "promprune", "video"] == KEPT + 6 + 2 + 5
    assert counted["promprune_budgets_total", "per_frame"] == 1


@pytest.mark.parametrize("orientation", TURNS)
def test_a_turned_photo_has_the_tokens_of_the_upright_one(pair: Pair, orientation: int) -> None:
    wide = upright(336, 112)
    straight, request = (body(each) for each in (saved(wide, "PNG"), turned(orientation, wide)))
    assert pair.ask(request).json()["choices"] == pair.ask(straight).json()["choices"]
    assert pruned(pair.ours, request)["choices"] == pruned(pair.ours, straight)["choices"]


def test_the_encoder_cache_is_as_large_as_vllm_makes_it(pair: Pair) -> None:
    """For a model that takes videos it holds the rows of the longest, however few an image has."""
    post(pair.ours, f"{PREFIX}{CHAT}", body(picture(LARGE)))
    reply = httpx.get(f"{pair.ours.url}{PREFIX}/v1/visual_tokens/caches", headers=KEY).raise_for_status().json()
    (encoder,) = reply["encoder"]
    assert 0 < encoder["rows"] <= encoder["capacity_rows"]
    assert encoder["capacity_rows"] > MOST


@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["the path is left on", "the proxy takes it off"])
def test_a_server_behind_a_path_obeys_at_it(pair: Pair, prefix: str) -> None:
    request = body(picture(SMALL))
    pair.ask(request, f"{prefix}{CHAT}")
    for path in (CHAT, "/tokenize", "/v1/messages"):
        asked = messages_request() if path == "/v1/messages" else request
        response = post(pair.ours, f"{prefix}{path}", {**asked, "visual_token_budget": KEPT})
        assert (response.status_code, response.headers["x-visual-tokens-kept"]) == (200, str(KEPT)), path
        refused = post(pair.ours, f"{prefix}{path}", {**asked, "visual_token_budget": -1})
        assert refused.status_code == 400, path
    for path in ("/v1/visual_tokens", "/v1/visual_tokens/caches", "/promprune", "/promprune/static/app.js"):
        assert httpx.get(f"{pair.ours.url}{prefix}{path}", headers=KEY).status_code == 200, path
    ours, theirs = (httpx.get(f"{each.url}{prefix}/openapi.json", timeout=60).json() for each in pair)
    assert ours["servers"] == theirs["servers"] == [{"url": PREFIX}]
    assert "visual_token_budget" in ours["components"]["schemas"]["ChatCompletionRequest"]["properties"]


@pytest.mark.parametrize("key", ["", "wrong"])
def test_without_the_key_every_route_is_closed_as_on_stock(pair: Pair, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    paths = {
        path
        for path in httpx.get(f"{pair.ours.url}/openapi.json", timeout=60).json()["paths"]
        if path.startswith("/v1")
    }
    assert len(paths) > 9
    for path in sorted(paths):
        for budget in (KEPT, -5):
            request = body(picture(SMALL), visual_token_budget=budget)
            ours, theirs = (post(each, path, request, headers) for each in pair)
            assert (ours.status_code, ours.text) == (theirs.status_code, theirs.text), path
            assert ours.status_code == 401, path
    with (
        openai.OpenAI(base_url=f"{pair.ours.url}{PREFIX}/v1", api_key=key or "none", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.chat.completions.create(model=MODEL, messages=body()["messages"])
    with (
        anthropic.Anthropic(base_url=f"{pair.ours.url}{PREFIX}", api_key=key or "none", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError),
    ):
        other.messages.create(**messages_request())
