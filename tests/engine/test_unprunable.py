"""Models that cannot be pruned: said once at start-up, refused with the reason, and otherwise answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from promprune_vllm.engine import plugin
from tests.checkpoints import CHECKPOINTS
from tests.clips import Clip
from tests.engine.conftest import Engine
from tests.engine.family_engine import FAMILY_ENGINES
from tests.engine.test_logprobs import engine  # noqa: F401  a fixture
from tests.server.conftest import MODEL, body, image_url

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
REASONS = {"text": "it takes no images", "siglip": "siglip_vision_model, which has no CLS token"}
FAMILY = {"text": None, "siglip": "LLaVA-1.5"}
"""The second has the architecture name that we prune, and a tower that we cannot."""
BUDGET = "visual_token_budget"
RENDER = "/v1/chat/completions/render"
Reply = tuple[int, Any]


async def asked(model: Path, requests: Mapping[str, tuple[str, Any]], *options: str) -> dict[str, Reply]:
    """Send requests to vLLM's server without an engine, in this process: name -> (path, body or ``None``)."""
    from vllm import AsyncEngineArgs
    from vllm.config import VllmConfig
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.render.app_state import init_render_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", str(model), "--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "1024"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*words, *options])
    app = build_app(args, ("render",))
    config = VllmConfig(model_config=AsyncEngineArgs.from_cli_args(args).create_model_config())
    await init_render_app_state(config, app.state, args)
    replies: dict[str, Reply] = {}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for name, (path, request) in requests.items():
            sent = client.get(path) if request is None else client.post(path, json=request)
            response = await sent
            replies[name] = response.status_code, response.json()
    return replies


def message(reply: Reply) -> str:
    status, document = reply
    assert status == 400, document
    return str(document["error"]["message"])


@pytest.mark.parametrize("name", REASONS)
def test_the_front_end_says_so_and_refuses_what_would_prune(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.register()
    images = [{"width": 64, "height": 64}]
    requests = {
        "plain": (RENDER, body()),
        "refused": (RENDER, body(visual_token_budget=8)),
        "again": (RENDER, body()),
        "state": ("/v1/visual_tokens", None),
        "count": ("/v1/visual_tokens/count", {"images": images}),
        "count with a budget": ("/v1/visual_tokens/count", {"images": images, BUDGET: 64}),
    }
    if name == "siglip":
        requests["photo"] = (RENDER, body("coffee"))
        requests["refused photo"] = (RENDER, body("coffee", visual_token_budget=8))
        requests["caches"] = ("/v1/visual_tokens/caches", None)
        requests["inspect"] = ("/v1/visual_tokens/inspect", {"image": image_url("coffee")})
        requests["photo again"] = (RENDER, body("coffee"))
    with caplog.at_level(logging.INFO, logger="vllm.promprune"):
        replies = asyncio.run(asked(CHECKPOINTS[name](tmp_path / name), requests))
    (said,) = (each for each in caplog.records if "PromPrune" in each.getMessage())
    assert said.levelname == "WARNING"
    assert REASONS[name] in said.getMessage()
    served = {key for key in requests if key.startswith(("plain", "again", "state", "photo"))}
    assert {key for key, (status, _) in replies.items() if status == 200} == served, replies
    for key in requests.keys() - served:
        assert REASONS[name] in message(replies[key]), key
    assert replies["refused"][1]["error"]["param"] == BUDGET
    _, state = replies["state"]
    assert (state["family"], state["prunable"]) == (FAMILY[name], False)
    assert REASONS[name] in state["reason"]
    for one, other in (("plain", "again"), ("photo", "photo again")):
        if one in replies:
            assert replies[one][1]["token_ids"] == replies[other][1]["token_ids"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--video-pruning-rate", "0.5"), "with --video-pruning-rate, vLLM's own pruning of videos"),
        (("--model-impl", "transformers"), "another implementation of it (--model-impl)"),
    ],
)
def test_a_video_is_refused_and_served_as_an_image_is(
    options: tuple[str, ...], reason: str, models: dict[str, Path]
) -> None:
    plugin.register()
    parts = {"photo": {"type": "image_url", "image_url": {"url": image_url("coffee")}}}
    parts["clip"] = {"type": "video_url", "video_url": {"url": Clip(7).mp4_url()}}
    requests: dict[str, tuple[str, Any]] = {}
    for name, part in parts.items():
        chat = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
        requests |= {name: (RENDER, chat), f"{name} with a budget": (RENDER, {**chat, BUDGET: 8})}
    replies = asyncio.run(asked(models["qwen2_5_vl"], requests, *options))
    for name in parts:
        assert replies[name][0] == 200, replies[name]
        assert reason in message(replies[f"{name} with a budget"])


@pytest.mark.parametrize("engine", REASONS, indirect=True)
def test_the_engine_answers_and_refuses_a_budget(engine: Engine, request: pytest.FixtureRequest) -> None:  # noqa: F811
    from vllm.exceptions import VLLMValidationError

    name = request.node.callspec.params["engine"]
    prompt = {"prompt": "USER: Hello. ASSISTANT:"} if name == "text" else engine.prompt(("coffee", None))
    (before,) = engine.generate([prompt])
    with pytest.raises(VLLMValidationError, match=REASONS[name]) as refused:
        engine.generate([{**prompt, "mm_processor_kwargs": {BUDGET: 8}}])
    assert refused.value.parameter == BUDGET
    (after,) = engine.generate([prompt])
    assert len(before.outputs[0].token_ids) == 6
    assert list(after.prompt_token_ids) == list(before.prompt_token_ids)
    assert after.outputs[0].token_ids == before.outputs[0].token_ids
