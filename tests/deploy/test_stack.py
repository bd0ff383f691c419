"""The compose stack in a real Docker engine: server and Prometheus, the CPU override, real networks and ports."""

from __future__ import annotations

import json
import sys
import time
import urllib.parse

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import VISUAL_TOKENS
from tests.deploy.conftest import API_KEY, Stack
from tests.deploy.docker_engine import Engine, EngineError
from tests.deploy.images import DEPLOY, ROOT
from tests.documents import example

pytestmark = [pytest.mark.deploy, pytest.mark.release, pytest.mark.timeout(1500)]
IMAGE = "promprune-vllm:0.2.0-cpu"
URL = "http://127.0.0.1:8000"
KEPT = "promprune_visual_tokens_kept_total"


def curl(stack: Stack, *arguments: str) -> tuple[int, str]:
    """Return status and body of a request from the Docker host."""
    text = stack.engine.inside(["curl", "-s", "-m", "60", "-w", "\n%{http_code}", *arguments])
    body, _, status = text.rpartition("\n")
    return int(status), body


def query(stack: Stack, promql: str) -> list[tuple[dict[str, str], float]]:
    status, body = curl(stack, f"http://127.0.0.1:9090/api/v1/query?query={urllib.parse.quote(promql)}")
    assert status == 200, body
    return [(row["metric"], float(row["value"][1])) for row in json.loads(body)["data"]["result"]]


def kept_tokens(stack: Stack) -> float:
    """Return what the server has counted by now."""
    status, body = curl(stack, f"{URL}/metrics")
    assert status == 200, body
    samples = (sample for family in text_string_to_metric_families(body) for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == KEPT)


def scraped_tokens(stack: Stack) -> float:
    """Return what Prometheus knows of that: it looks every few seconds."""
    return sum(value for _, value in query(stack, KEPT + '{job="promprune"}'))


def test_every_service_becomes_healthy(stack: Stack) -> None:
    print(f"healthy after {stack.healthy_seconds:.0f} s")
    assert stack.compose.statuses() == {"vllm": "healthy", "prometheus": "healthy"}


def test_a_budget_saves_prompt_tokens_and_prometheus_has_seen_it(stack: Stack) -> None:
    script = str(ROOT / "tests" / "deploy" / "client.py")
    before = kept_tokens(stack)
    full, pruned = json.loads(stack.engine.inside([sys.executable, script, f"{URL}/v1", API_KEY], timeout=300))
    assert full["prompt_tokens"] - pruned["prompt_tokens"] == VISUAL_TOKENS - 64
    assert pruned["visual_tokens"]["kept"] == 64
    after = kept_tokens(stack)
    assert after - before == VISUAL_TOKENS + 64
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and scraped_tokens(stack) < after:
        time.sleep(1)
    assert scraped_tokens(stack) == after
    assert [value for _, value in query(stack, 'up{job="promprune"}')] == [1.0]


def test_the_readme_gets_to_the_first_saved_token(stack: Stack) -> None:
    """What comes after `docker compose up`; the lines before it are what the fixture does."""
    _, _, rest = example("compose").partition("docker compose up -d --wait\n. ./.env && ")
    script = f"cd {DEPLOY} && VLLM_API_KEY={API_KEY} && {rest}"
    printed = stack.engine.inside(["bash", "-c", script])
    assert printed.split() == ["x-visual-tokens-seen:", str(VISUAL_TOKENS), "x-visual-tokens-kept:", "64"]


def test_the_api_key_is_required(stack: Stack) -> None:
    assert curl(stack, f"{URL}/v1/models")[0] == 401
    assert curl(stack, f"{URL}/v1/models", "-H", f"Authorization: Bearer {API_KEY}")[0] == 200


def test_ports_are_open_on_loopback_only(stack: Stack) -> None:
    """The Docker host has other addresses, those of its bridges: nothing answers there."""
    addresses = stack.engine.docker(
        "network", "inspect", "promprune_serving", "-f", "{{(index .IPAM.Config 0).Gateway}}"
    )
    for port in (8000, 9090):
        assert curl(stack, f"http://127.0.0.1:{port}/metrics")[0] == 200
        with pytest.raises(EngineError):
            curl(stack, f"http://{addresses.strip()}:{port}/metrics")


@pytest.mark.parametrize("service", ["vllm", "prometheus"])
def test_containers_can_do_little(stack: Stack, service: str) -> None:
    container = stack.container(service)
    facts = stack.engine.inspect(container)
    assert facts["HostConfig"]["ReadonlyRootfs"]
    assert facts["HostConfig"]["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in facts["HostConfig"]["SecurityOpt"]
    assert not facts["HostConfig"]["Privileged"]
    shell = "id -u; touch /x 2>/dev/null || echo read-only; grep CapEff /proc/self/status"
    user, root, capabilities = stack.engine.docker("exec", container, "sh", "-c", shell).splitlines()
    assert user != "0"
    assert root == "read-only"
    assert int(capabilities.split()[1], 16) == 0


def test_images_are_fetched_from_no_host_by_default(stack: Stack) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://prometheus:9090/favicon.ico"}}
    body = {"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": [image]}]}
    headers = ("-H", f"Authorization: Bearer {API_KEY}", "-H", "Content-Type: application/json")
    status, text = curl(stack, f"{URL}/v1/chat/completions", *headers, "-d", json.dumps(body))
    assert 400 <= status < 500
    assert "allowed domains" in text


def test_the_image_serves_nobody_without_a_decision_about_the_key(images: None, engine: Engine) -> None:
    with pytest.raises(EngineError, match="VLLM_API_KEY is not set"):
        engine.docker("run", "--rm", "--network=none", IMAGE)
    shown = engine.docker("run", "--rm", "--network=none", IMAGE, "model", "--dry-run")
    assert json.loads(shown)["method"] == "promprune"


def test_the_image_is_small_and_says_what_it_is(images: None, engine: Engine) -> None:
    facts = engine.inspect(IMAGE)
    print(f"{facts['Size'] / 1e9:.2f} GB")
    assert facts["Size"] < 2.6e9
    assert facts["Config"]["User"] == "10001:10001"
    assert facts["Config"]["Healthcheck"]["Test"][0] == "CMD"
    assert facts["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    compilers = "command -v gcc cc g++ clang || echo none"
    assert engine.docker("run", "--rm", "--network=none", "--entrypoint=sh", IMAGE, "-c", compilers) == "none\n"
