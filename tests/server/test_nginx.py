"""nginx before a server, as deploy/nginx has it: requests and replies pass unchanged, streams without delay."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from promprune_vllm.demo.server import Server, free_port
from tests.conftest import VISUAL_TOKENS
from tests.deploy.docker_engine import environment
from tests.server import fronts
from tests.server.conftest import MODEL, body, saved
from tests.server.test_reply import messages_request

pytestmark = [pytest.mark.server, pytest.mark.release]
SITE = Path(__file__).parents[2] / "deploy" / "nginx" / "promprune.conf"
# What Debian's nginx.conf and its packaging do around a site; in one process, which stays the user that it is.
AROUND = """
daemon off;
master_process off;
pid FOLDER/pid;
events {}
http {
    access_log off;
    client_body_temp_path FOLDER/body;
    proxy_temp_path FOLDER/proxy;
    fastcgi_temp_path FOLDER/fastcgi;
    uwsgi_temp_path FOLDER/uwsgi;
    scgi_temp_path FOLDER/scgi;
    include FOLDER/promprune.conf;
}
"""
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def front(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of nginx with the site as it is, but for its two ports."""
    program = shutil.which("nginx", path=environment()["PATH"])
    if program is None:
        pytest.skip("nginx is not on this machine (`make tools` fetches it on Debian)")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    site = SITE.read_text()
    for written, ours in (("127.0.0.1:8000", httpx.URL(server.url).netloc.decode()), ("listen 8080;", "")):
        assert site.count(written) == 1
        site = site.replace(written, ours or f"listen 127.0.0.1:{port};")
    (folder / "promprune.conf").write_text(site)
    (folder / "nginx.conf").write_text(AROUND.replace("FOLDER", str(folder)))
    words = [program, "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    url = f"http://127.0.0.1:{port}"
    with fronts.running(words, log=folder / "log", ready=f"{url}/v1/models"):
        yield url


def test_replies_are_those_of_the_server(front: str, server: Server) -> None:
    def told(url: str, path: str, request: dict[str, Any]) -> tuple[int, str | None, Any]:
        reply = httpx.post(f"{url}{path}", json=request, timeout=300)
        answer = reply.json()
        said = answer.get("error") or answer["usage"]["visual_tokens"]
        return reply.status_code, reply.headers.get("x-visual-tokens-kept"), said

    budgets = (20, "25%", {"total": 30}, 0, "many")
    requests = [(CHAT, body("coffee", visual_token_budget=budget)) for budget in budgets]
    requests.append(("/v1/messages", {**messages_request(), "visual_token_budget": 20}))
    replies = [told(front, *each) for each in requests]
    assert replies == [told(server.url, *each) for each in requests]
    assert [status for status, _, _ in replies] == [200, 200, 200, 400, 400, 200]
    assert [kept for _, kept, _ in replies] == ["20", "144", "30", None, None, "20"]


def test_a_refusal_reaches_the_sdk(front: str) -> None:
    messages: Any = body("coffee")["messages"]
    with (
        openai.OpenAI(base_url=f"{front}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="visual_token_budget must be") as refused,
    ):
        client.chat.completions.create(model=MODEL, messages=messages, extra_body={"visual_token_budget": 0})
    assert refused.value.param == "visual_token_budget"


def test_an_image_may_be_larger_than_nginx_lets_through_by_default(front: str) -> None:
    large = saved(Image.frombytes("RGB", (800, 800), random.Random("nginx").randbytes(3 * 800 * 800)), "PNG")
    assert len(large) > 2 << 20
    reply = httpx.post(f"{front}{CHAT}", json=body(large, visual_token_budget=20), timeout=300)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["visual_tokens"]["kept"] == 20


def test_tokens_of_a_stream_arrive_while_others_are_made(front: str, server: Server) -> None:
    def running() -> float:
        return server.metrics("vllm:num_requests_running")["vllm:num_requests_running"]

    request = body("coffee", visual_token_budget=20, stream=True, max_tokens=1500)
    with httpx.stream("POST", f"{front}{CHAT}", json=request, timeout=300) as reply:
        assert reply.headers["x-visual-tokens-kept"] == "20"
        pieces = reply.iter_raw()  # forgotten, it would close the connection
        assert len(list(islice(pieces, 10))) == 10
        assert running() == 1
    deadline = time.monotonic() + 5  # the server learns that the client has left: all tokens would take longer
    while running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running() == 0


def test_the_end_of_a_stream_has_the_count(front: str) -> None:
    usage = {"stream_options": {"include_usage": True}}
    request = body("coffee", visual_token_budget=20, stream=True, **usage)
    text = httpx.post(f"{front}{CHAT}", json=request, timeout=300).text
    *_, last, done = (line for line in text.splitlines() if line)
    assert done == "data: [DONE]"
    counted = json.loads(last.removeprefix("data: "))["usage"]["visual_tokens"]
    assert (counted["seen"], counted["kept"]) == (VISUAL_TOKENS, 20)


def test_only_what_needs_a_key_is_forwarded(front: str, server: Server) -> None:
    for path in ("/metrics", "/health", "/promprune"):
        assert httpx.get(f"{front}{path}", timeout=60).status_code == 404
        assert httpx.get(f"{server.url}{path}", timeout=60, follow_redirects=True).status_code == 200
    for path in ("/invocations", "/tokenize"):
        assert httpx.post(f"{front}{path}", json={}, timeout=60).status_code == 404
    assert httpx.get(f"{front}/v1/visual_tokens", timeout=60).json()["model"] == MODEL
