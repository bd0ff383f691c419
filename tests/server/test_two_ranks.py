"""Two tensor-parallel ranks keep the same tokens; where one fails, one client gets an error and no other does.

And a router before that server and one of a single rank.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from promprune_vllm.demo.server import Server, free_port, serving, wait_until_healthy
from promprune_vllm.engine.compat.patching import Stage
from tests import runner
from tests.conftest import VISUAL_TOKENS
from tests.patched import WORKER, targets
from tests.server.conftest import ENVIRONMENT, OPTIONS, ask, body, grown, post, series

pytestmark = [pytest.mark.server, pytest.mark.release]
ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def two_ranks(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("two-ranks")
    environment = {
        **ENVIRONMENT,
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc
        "PYTHONPATH": runner.python_path(ROOT),
        "PROMPRUNE_TEST_PATCHED": str(folder),
    }
    extension = ("--worker-extension-cls", "tests.server.broken.BrokenWorker", "--tensor-parallel-size", "2")
    with serving(demo_model, *OPTIONS, *extension, log=folder / "log", environment=environment) as running:
        assert runner.in_force(running.log.read_text()) == runner.chosen()
        yield running


def test_in_each_process_what_is_patched_is_what_the_rows_say(two_ranks: Server) -> None:
    """In the API server, the engine's core and each worker: nothing without a row, no row without its effect."""
    assert ask(two_ranks, "coffee", visual_token_budget=9)["usage"]["visual_tokens"]["kept"] == 9
    names = {
        process.pid: name
        for process in psutil.Process(two_ranks.process.pid).children(recursive=True)
        if (name := _role(process))
    }
    assert sorted(names.values()) == ["API server", "engine core", "worker", "worker"]
    folder = two_ranks.log.parent
    (folder / "ask").touch()
    deadline = time.monotonic() + 60
    answers = [folder / f"{pid}.json" for pid in names]
    while not all(answer.exists() for answer in answers):
        assert time.monotonic() < deadline, names
        time.sleep(0.1)
    front = {Stage.PLUGIN, Stage.PROCESSOR}
    stages = {
        "API server": {*front, Stage.COMMAND, Stage.REPLIES},
        "engine core": {*front, Stage.SCHEDULER},
        "worker": {*front, *WORKER},
    }
    for pid, name in names.items():
        found = json.loads((folder / f"{pid}.json").read_text())
        assert set(found["patched"]) == targets(found["loaded"], *stages[name]), name


def _role(process: psutil.Process) -> str | None:
    title = " ".join(process.cmdline())
    roles = {"promprune_vllm serve": "API server", "VLLM::EngineCore": "engine core", "VLLM::Worker": "worker"}
    return next((role for start, role in roles.items() if start in title), None)


def _break(server: Server, **keeps: list[int]) -> None:
    by_rank = {rank.removeprefix("rank"): budgets for rank, budgets in keeps.items()}
    call = {"method": "break_selection", "args": [json.dumps(by_rank)]}
    assert post(server, "/collective_rpc", call).status_code == 200


def _ids(server: Server, photo: str, budget: int) -> list[int]:
    choice = ask(server, photo, visual_token_budget=budget, return_token_ids=True)["choices"][0]
    return list(choice["token_ids"])


def test_two_ranks_answer_as_one(server: Server, two_ranks: Server) -> None:
    def answers(of: Server) -> list[Any]:
        asked = [ask(of, "coffee", "rocket", visual_token_budget=k, return_token_ids=True) for k in (None, 64, 16)]
        return [(answer["usage"]["prompt_tokens"], answer["choices"][0]["token_ids"]) for answer in asked]

    before = series(two_ranks)
    assert answers(two_ranks) == answers(server)
    # Two images under two budgets that prune: only the first rank counts. The encoder also ran without.
    counts = grown(series(two_ranks), before)
    for stage in ("choose", "assemble"):
        assert counts["promprune_selection_seconds_count", "promprune", stage] == 4
    assert counts["promprune_spectral_entropy_count", "promprune"] == 4
    assert counts["promprune_encoder_batch_tokens_sum",] == 6 * VISUAL_TOKENS


FAILING = [("rank0", "rank1"), ("rank0",), ("rank1",)]


@pytest.mark.parametrize("ranks", FAILING, ids="+".join)
def test_the_client_gets_500_and_the_server_goes_on(two_ranks: Server, ranks: tuple[str, ...]) -> None:
    budget = 50 + 2 * FAILING.index(ranks)  # neither this nor the next is one that another case left in a cache
    before = two_ranks.metrics("promprune_requests")["promprune_requests_total"]
    _break(two_ranks, **{rank: [budget] for rank in ranks})
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(_ids, two_ranks, photo, budget + 1) for photo in ("coffee", "rocket")]
        response = post(two_ranks, CHAT, body("coffee", visual_token_budget=budget))
        answers = [other.result() for other in others]
    assert response.status_code == 500, response.text
    error = response.json()["error"]
    assert error["code"] == 500
    assert error["type"] == "InternalServerError"
    assert httpx.get(f"{two_ranks.url}/health", timeout=30).status_code == 200
    assert answers == [_ids(two_ranks, photo, budget + 1) for photo in ("coffee", "rocket")]
    streamed = post(two_ranks, CHAT, body("coffee", visual_token_budget=budget, stream=True)).text
    assert '"error"' in streamed
    assert '"content":"' not in streamed.replace('"content":""', "")
    _break(two_ranks)
    assert len(_ids(two_ranks, "coffee", budget)) == 6
    # Accepted: one that failed, four others, one that failed while streamed, one at last; and two failures.
    assert two_ranks.metrics("promprune_requests")["promprune_requests_total"] - before == 9


def test_a_repeat_is_answered_as_by_a_server_where_nothing_failed(two_ranks: Server, server: Server) -> None:
    _break(two_ranks, rank0=[48], rank1=[48])
    assert post(two_ranks, CHAT, body("chelsea", visual_token_budget=48)).status_code == 500
    _break(two_ranks)
    assert _ids(two_ranks, "chelsea", 48) == _ids(server, "chelsea", 48)
    log = two_ranks.log.read_text()
    assert "Selecting 48 of 576 visual tokens with method 'promprune' failed" in log
    assert "RuntimeError: cannot keep 48" in log


@pytest.fixture
def router(server: Server, two_ranks: Server, tmp_path: Path) -> Iterator[str]:
    """vLLM's own router before two replicas; one of them has two ranks."""
    port, log = str(free_port()), tmp_path / "router.log"
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm_router.launch_router", "--policy", "round_robin"]
    command += ["--worker-urls", server.url, two_ranks.url, "--host", "127.0.0.1", "--port", port]
    command += ["--prometheus-port", str(free_port())]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until_healthy(Server(url, log, process))
        yield url
    finally:
        process.terminate()
        process.wait(20)


def test_a_router_before_two_replicas_lets_budgets_through(router: str, server: Server, two_ranks: Server) -> None:
    def answer(budget: int | str) -> httpx.Response:
        return httpx.post(f"{router}{CHAT}", json=body("coffee", visual_token_budget=budget), timeout=120)

    before = [each.metrics("promprune_requests")["promprune_requests_total"] for each in (server, two_ranks)]
    answers = [answer(64) for _ in range(4)]
    assert {reply.status_code for reply in answers} == {200}
    assert {reply.json()["usage"]["visual_tokens"]["kept"] for reply in answers} == {64}
    assert {reply.headers["x-visual-tokens-kept"] for reply in answers} == {"64"}
    assert len({reply.json()["choices"][0]["message"]["content"] for reply in answers}) == 1
    after = [each.metrics("promprune_requests")["promprune_requests_total"] for each in (server, two_ranks)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 2]
    refused = answer("many")
    assert refused.status_code == 400
    assert "many" in refused.text
    streamed = httpx.post(
        f"{router}{CHAT}",
        json=body("coffee", visual_token_budget=64, stream=True, stream_options={"include_usage": True}),
        timeout=120,
    )
    assert '"kept":64' in streamed.text
