"""Clients that go away, processes that die, directories that vanish."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from promprune_vllm.demo.server import Server, free_port, is_healthy, serving
from tests.server.conftest import ENVIRONMENT, OPTIONS, ask, body, noise

pytestmark = pytest.mark.server
CHAT = "/v1/chat/completions"
PATIENCE_SECONDS = 120.0


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def idle(server: Server) -> bool:
    now = server.metrics("vllm:")
    return not (
        now["vllm:num_requests_running"] or now["vllm:num_requests_waiting"] or now["vllm:kv_cache_usage_perc"]
    )


def upload_half(server: Server, asked: dict[str, Any]) -> None:
    content = json.dumps(asked).encode()
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        )
        client.sendall(f"{head}\r\n\r\n".encode() + content[: len(content) // 2])


def leave_while_it_waits(server: Server, asked: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}{CHAT}", json=asked, timeout=0.1)


def leave_in_the_stream(server: Server, asked: dict[str, Any]) -> None:
    with httpx.stream("POST", f"{server.url}{CHAT}", json={**asked, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")


@pytest.mark.parametrize("leave", [upload_half, leave_while_it_waits, leave_in_the_stream])
def test_a_client_that_goes_away_leaves_nothing_behind(
    server: Server, leave: Callable[[Server, dict[str, Any]], None]
) -> None:
    def answer() -> Any:
        return ask(server, "chelsea", "rocket", visual_token_budget=90, return_token_ids=True)["choices"][0][
            "token_ids"
        ]

    expected = answer()
    for i in range(4):
        leave(server, body("chelsea", "rocket", visual_token_budget=91 + i, max_tokens=600))
    until(lambda: idle(server))
    assert answer() == expected


def test_forty_budgets_of_one_image_at_once_while_thirty_clients_leave(server: Server) -> None:
    picture = noise("forty")
    staying = [budget for budget in range(5, 45) if budget % 4 == 0]

    def request(budget: int, **fields: Any) -> dict[str, Any]:
        return body(picture, visual_token_budget=budget, return_token_ids=True, **fields)

    def answer(budget: int) -> Any:
        if budget in staying:
            return ask(server, **request(budget, cache_salt="together"))["choices"][0]["token_ids"]
        leaving = request(budget, max_tokens=900, stream=True)
        with httpx.stream("POST", f"{server.url}{CHAT}", json=leaving, timeout=PATIENCE_SECONDS) as response:
            return next(response.iter_lines())

    alone = [ask(server, **request(budget, cache_salt="alone"))["choices"][0]["token_ids"] for budget in staying]
    with ThreadPoolExecutor(40) as pool:
        answers = dict(zip(range(5, 45), pool.map(answer, range(5, 45)), strict=True))
    assert [answers[budget] for budget in staying] == alone
    assert sum(str(line).startswith("data: {") for line in answers.values()) == 30
    until(lambda: idle(server))
    assert is_healthy(server.url)


@pytest.mark.parametrize(
    "more", [{}, {"n": 2, "temperature": 1}, {"stream": True}], ids=["whole", "two", "stream"]
)
def test_an_image_of_a_refused_request_is_answered_the_next_time(server: Server, more: dict[str, Any]) -> None:
    """vLLM alone answers the second request with HTTP 500: it believes that the engine has the image."""
    images = [noise(f"{more}{i}") for i in range(4)]
    refused = httpx.post(f"{server.url}{CHAT}", json=body(*images), timeout=60)
    assert refused.status_code == 400, refused.text  # 4 x 576 tokens and 2,048 are allowed
    before = server.metrics("promprune_requests")["promprune_requests_total"]
    response = httpx.post(f"{server.url}{CHAT}", json=body(images[0], **more), timeout=60)
    assert response.status_code == 200, response.text
    assert '"error"' not in response.text
    assert server.metrics("promprune_requests")["promprune_requests_total"] == before + 1
    assert "is sent again" in server.log.read_text()


@pytest.mark.release
def test_a_life_with_a_scrape_at_birth_a_lost_directory_and_a_killed_engine(
    server: Server, demo_model: Path, tmp_path: Path
) -> None:
    """One start serves for several faults; a second shows that it serves again, both beside another server."""
    port, born = free_port(), threading.Event()
    statuses: set[int] = set()

    def scrape() -> None:
        while not born.wait(0.1):
            try:
                statuses.add(httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).status_code)
            except httpx.TransportError:
                statuses.add(0)

    scraping = threading.Thread(target=scrape)
    scraping.start()
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    expected = _ids(server)
    with serving(demo_model, *OPTIONS, log=tmp_path / "log", port=port, environment=environment) as one:
        born.set()
        scraping.join()
        assert statuses <= {0, 200}  # nobody listens, or all is there
        assert _ids(one) == expected
        assert one.metrics("promprune_requests")["promprune_requests_total"] == 1  # its own, not its neighbour's

        (directory,) = tmp_path.glob("promprune-metrics-*")
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
        assert _ids(one) == expected
        assert httpx.get(f"{one.url}/metrics", timeout=30).status_code == 200

        engines = [
            each
            for each in psutil.Process(one.process.pid).children(recursive=True)
            if "EngineCore" in each.name() or "EngineCore" in " ".join(each.cmdline())
        ]
        assert engines
        for engine in engines:
            engine.kill()
        until(lambda: not is_healthy(one.url))
        assert not is_healthy(one.url)
    assert is_healthy(server.url)
    assert "EngineDeadError" in (log := (tmp_path / "log").read_text()) or "died" in log
    with serving(demo_model, *OPTIONS, log=tmp_path / "log", port=port, environment=environment) as again:
        assert _ids(again) == expected


def _ids(server: Server) -> Any:
    return ask(server, "coffee", visual_token_budget=64, return_token_ids=True)["choices"][0]["token_ids"]
