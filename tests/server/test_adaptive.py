"""Adapting to load on a real server: "auto" gives way, explicit budgets do not, and it all comes back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from promprune_vllm.demo.server import Server
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import _serving, ask, measured, saved
from tests.server.test_named import answer, named, refusal, sent

pytestmark = [pytest.mark.server, pytest.mark.release]
LEVEL = "promprune_policy_level"
SEEN, KEPT = "promprune_visual_tokens_seen_total", "promprune_visual_tokens_kept_total"
PATIENCE_SECONDS = 240


BUSY = ("--num-gpu-blocks-override", "96")


@pytest.fixture(scope="module")
def adapting_server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """To the load, and to what images hold."""
    options, variables = measured()
    variables |= {"PROMPRUNE_ADAPT_TO_LOAD": "true", "PROMPRUNE_ADAPT_TO_CONTENT": "true"}
    yield from _serving(demo_model, tmp_path_factory.mktemp("adapting"), *BUSY, *options, **variables)


@pytest.fixture
def two_api_servers(demo_model: Path, tmp_path: Path) -> Iterator[Server]:
    yield from _serving(demo_model, tmp_path, *BUSY, "--api-server-count", "2", PROMPRUNE_ADAPT_TO_LOAD="true")


def _new_image(seed: int) -> Image.Image:
    """An image no cache has seen."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def _prompt_tokens(server: Server, seed: int, image: Image.Image | None = None, **fields: Any) -> int:
    answer = ask(server, saved(image or _new_image(seed), "PNG"), **fields)
    return int(answer["usage"]["prompt_tokens"])


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_two_api_servers_give_way_and_come_back_as_one(two_api_servers: Server) -> None:
    test_the_default_gives_way_under_load_and_comes_back(two_api_servers)


def test_the_default_gives_way_under_load_and_comes_back(adapting_server: Server) -> None:
    server = adapting_server

    def level() -> float:
        return server.metrics(LEVEL)[LEVEL]

    assert level() == 1
    full = _prompt_tokens(server, 0, visual_token_budget="auto")
    text = full - VISUAL_TOKENS
    before = server.metrics("promprune")
    stop = False

    def keep_asking(worker: int) -> list[int]:
        asked: list[int] = []
        while not stop:
            seed = 1000 * (worker + 1) + len(asked)
            budget = {"visual_token_budget": "auto"} if worker % 2 else {}
            asked.append(_prompt_tokens(server, seed, max_tokens=48, **budget))
        return asked

    with ThreadPoolExecutor(16) as pool:
        clients: list[Future[list[int]]] = [pool.submit(keep_asking, worker) for worker in range(12)]
        try:
            _wait(lambda: level() <= 0.25, "the level did not fall")
            explicit = [_prompt_tokens(server, seed, visual_token_budget=100) for seed in (1, 2)]
            everything = _prompt_tokens(server, 3, visual_token_budget="full")
        finally:
            stop = True
        asked = [tokens for client in clients for tokens in client.result()]
    assert explicit == [text + 100] * 2
    assert everything == full
    kept = {tokens - text for tokens in asked}
    assert kept <= {576, 288, 144, 72}, "only the few levels"
    assert kept & {144, 72}
    after = server.metrics("promprune")
    assert after[KEPT] - before[KEPT] == sum(asked) - text * len(asked) + 2 * 100 + VISUAL_TOKENS
    assert after[SEEN] - before[SEEN] == VISUAL_TOKENS * (len(asked) + 3)

    _wait(lambda: level() == 1, "the level did not come back")
    assert _prompt_tokens(server, 4) == full
    log = server.log.read_text()
    assert '"auto" keeps 1/2 of the default (KV cache' in log
    assert '"auto" keeps 1 of the default (KV cache' in log


def test_a_plain_image_keeps_less_unless_a_budget_is_sent(adapting_server: Server) -> None:
    server, plain = adapting_server, Image.new("RGB", (400, 300), "navy")
    text = ask(server, "astronaut")["usage"]["prompt_tokens"] - VISUAL_TOKENS
    assert text < 100, "the photograph keeps every token"
    assert _prompt_tokens(server, 0, plain) == text + VISUAL_TOKENS // 8
    assert _prompt_tokens(server, 0, plain, visual_token_budget="auto") == text + VISUAL_TOKENS // 8
    assert _prompt_tokens(server, 0, plain, visual_token_budget=100) == text + 100
    assert _prompt_tokens(server, 0, plain, visual_token_budget="full") == text + VISUAL_TOKENS
    assert _prompt_tokens(server, 5) == text + VISUAL_TOKENS, "noise is no plain image"
    assert server.metrics(LEVEL)[LEVEL] == 1, "the level of the load, not of images"

    def kept(request: dict[str, Any]) -> int:
        return int(answer(server, request)[0]["usage"]["visual_tokens"]["kept"])

    by_uuid = sent("plain", saved(plain, "PNG"))
    assert kept(by_uuid) == kept(named(by_uuid)) == VISUAL_TOKENS // 8
    unseen = sent("not looked at", saved(plain, "PNG"), visual_token_budget="full")
    assert kept(unseen) == kept(named(unseen)) == VISUAL_TOKENS
    assert "does not know enough" in refusal(server, named({**unseen, "visual_token_budget": "auto"}))


def test_a_server_that_does_not_adapt_shows_the_full_default(server: Server) -> None:
    ask(server, "coffee")
    assert server.metrics(LEVEL)[LEVEL] == 1


def test_adapting_without_the_engines_statistics_is_refused_at_start_up(demo_model: Path) -> None:
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--disable-log-stats")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "promprune_vllm",
            "serve",
            str(demo_model),
            *options,
            "--visual-token-adapt-to-load",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert "--visual-token-adapt-to-load" in last
    assert "--disable-log-stats" in last
