"""``/v1/visual_tokens``: what is in force, what a budget would keep, and our fields in the API document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from PIL import Image

import promprune_vllm
from promprune_vllm.demo import photo_path
from promprune_vllm.demo.families import build_family_model
from promprune_vllm.demo.server import Server
from promprune_vllm.engine.compat.versions import TESTED
from promprune_vllm.server.near_misses import FIELDS
from promprune_vllm.server.openapi import request_schemas
from tests.conftest import VISUAL_TOKENS
from tests.server.browser import chromium
from tests.server.conftest import MODEL, _serving, ask, body, post, saved
from tests.server.test_faults import until

pytestmark = pytest.mark.server
ROUTE = "/v1/visual_tokens"
COUNT = f"{ROUTE}/count"
KEY = "a-very-secret-key"
BUDGETS: list[Any] = [None, 64, 1, 5000, 0.25, "25%", "full", "auto", [64, "full"], ["10%", 3], {"total": 100}]


def sizes(*photos: str) -> list[dict[str, int]]:
    found = []
    for name in photos:
        with Image.open(photo_path(name)) as image:
            found.append({"width": image.width, "height": image.height})
    return found


def test_the_server_says_what_is_in_force(server: Server) -> None:
    state = httpx.get(f"{server.url}{ROUTE}").raise_for_status().json()
    assert state["version"] == promprune_vllm.__version__
    assert state["vllm_version"].partition("+")[0] in TESTED
    assert state["vllm_check"]["tested"] is True
    assert (state["model"], state["architecture"]) == (MODEL, "LlavaForConditionalGeneration")
    assert (state["family"], state["prunable"], state["reason"]) == ("LLaVA-1.5", True, None)
    assert state["method"]["name"] == "promprune"
    assert state["method"]["options"]["mu"] == 0.42
    assert [method["name"] for method in state["allowed_methods"]] == ["promprune"]
    assert state["limits"] == {
        "default": "full",
        "min": 1,
        "max": None,
        "low": 64,
        "out_of_range": "clamp",
        "floor": 64,
        "detail": False,
        "videos": {"default": "full", "min": 1, "max": None},
    }
    assert state["adaptation"] == {"to_load": False, "to_content": False, "level": 1.0}
    for value in ([], 0, "most", {"total": 0}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, state["fields"]["visual_token_budget"])


@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
def test_a_count_is_what_a_real_request_reports(server: Server, budget: Any) -> None:
    photos = ("coffee", "rocket")
    counted = post(server, COUNT, {"images": sizes(*photos), "visual_token_budget": budget}).json()
    used = ask(server, *photos, visual_token_budget=budget, max_tokens=1)["usage"]["visual_tokens"]
    assert {key: counted[key] for key in used} == used


def test_cache_bytes_are_those_of_vllms_own_blocks(server: Server) -> None:
    cache = post(server, COUNT, {"images": sizes("coffee"), "visual_token_budget": 64}).json()["kv_cache"]
    each = cache["bytes_per_token"]
    assert cache == {
        "bytes_per_token": each,
        "seen": VISUAL_TOKENS * each,
        "kept": 64 * each,
        "saved": (VISUAL_TOKENS - 64) * each,
    }
    (config,) = [
        sample.labels
        for family in server.families()
        for sample in family.samples
        if sample.name == "vllm:cache_config_info"
    ]
    block = int(config["block_size"]) * each
    assert int(config["kv_cache_memory_bytes"]) // block == int(config["num_gpu_blocks"])


@pytest.mark.parametrize(
    "budget", [0, -1, 64.5, "064", True, [], [64], {}, {"total": 1}, 10**400], ids=lambda b: repr(b)[:20]
)
def test_a_bad_budget_is_refused_as_by_a_real_request(server: Server, budget: Any) -> None:
    before = server.metrics("promprune_requests")["promprune_requests_total"]
    counted = post(server, COUNT, {"images": sizes("coffee", "rocket"), "visual_token_budget": budget})
    assert server.metrics("promprune_requests")["promprune_requests_total"] == before
    asked = post(server, "/v1/chat/completions", body("coffee", "rocket", visual_token_budget=budget))
    assert counted.status_code == asked.status_code == 400
    assert counted.json() == asked.json()
    assert counted.json()["error"]["param"] == "visual_token_budget"


def test_the_caches_say_what_they_hold(server: Server) -> None:
    ask(server, "astronaut", visual_token_budget=45)
    told = httpx.get(f"{server.url}{ROUTE}/caches").raise_for_status().json()
    (encoder,) = told["encoder"]
    assert encoder["images"] >= 1
    assert 45 <= encoder["rows"] <= encoder["capacity_rows"] == VISUAL_TOKENS
    processor = told["processor"]
    assert processor["images"] >= 1
    assert 0 < processor["bytes"] <= processor["capacity_bytes"]
    assert told["features"] is None


SIZE = {"width": 640, "height": 480}
MALFORMED: list[Any] = [
    {},
    {"images": []},
    {"images": [SIZE] * 65},
    {"images": [{"width": 640}]},
    {"images": [{"width": 0, "height": 1}]},
    {"images": [{"width": 65_536, "height": 1}]},
    {"images": [{"width": "640", "height": 480}]},
    {"images": [SIZE], "visual_token_budgets": 64},
    {"images": [SIZE], "detail": ["lowest"]},
    {"images": [SIZE], "detail": ["low", "low"]},
    [],
    None,
]


@pytest.mark.parametrize("request_body", MALFORMED, ids=lambda value: repr(value)[:40])
def test_a_malformed_count_is_refused_in_openais_form(server: Server, request_body: Any) -> None:
    response = post(server, COUNT, request_body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == 400
    assert error["param"]


def test_the_document_shows_our_fields(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).raise_for_status().json()
    schemas = document["components"]["schemas"]
    taking = set(request_schemas(document))
    again = set(request_schemas(document, "visual_token_escalate"))
    assert {"ChatCompletionRequest", "ResponsesRequest", "AnthropicMessagesRequest"} <= again <= taking
    for name in taking - {"CountRequest", "InspectRequest"}:  # our own say it themselves
        for field in FIELDS if name in again else FIELDS[:2]:
            assert schemas[name]["properties"][field] == {"$ref": f"#/components/schemas/{field}"}
            assert schemas[field]["description"]
            assert schemas[field]["examples"]
    assert {form["title"] for form in schemas["visual_token_budget"]["oneOf"]} >= {"Tokens", "Share", "Total"}
    assert {ROUTE, COUNT} <= set(document["paths"])
    docs = httpx.get(f"{server.url}/docs")
    assert docs.status_code == 200
    assert docs.headers["content-type"].startswith("text/html")
    assert "swagger" in docs.text


def test_the_rest_of_the_document_is_stock_vllms(server: Server, stock: Server) -> None:
    ours, theirs = (httpx.get(f"{each.url}/openapi.json", timeout=60).json() for each in (server, stock))
    for name in set(request_schemas(ours)) & theirs["components"]["schemas"].keys():
        for field in FIELDS:
            ours["components"]["schemas"][name]["properties"].pop(field, None)
    assert {path: ours["paths"][path] for path in theirs["paths"]} == theirs["paths"]
    shown = theirs["components"]["schemas"]
    assert {name: ours["components"]["schemas"][name] for name in shown} == shown


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A family whose mu nobody measured, an API key, two API servers, limits of the operator, and no logprobs."""
    directory = tmp_path_factory.mktemp("guarded")
    model = build_family_model("qwen2_vl", directory / "model")
    options = (
        *("--api-server-count", "2", "--visual-token-detail"),
        *("--visual-token-budget", "50%", "--visual-token-low", "8", "--visual-token-max", "40"),
        *("--allow-methods", "random,uniform", "--max-logprobs", "0"),
    )
    yield from _serving(model, directory, *options, VLLM_API_KEY=KEY)


def _jpeg(width: int, height: int) -> str:
    """A photograph of another size, as a data URL."""
    with Image.open(photo_path("coffee")) as photo:
        return saved(photo.convert("RGB").resize((width, height)), "JPEG")


def test_every_api_server_asks_for_the_key_and_counts_by_the_operators_limits(guarded_server: Server) -> None:
    server = guarded_server
    for path, call in ((ROUTE, httpx.get), (COUNT, httpx.post), (f"{ROUTE}/inspect", httpx.post)):
        for headers in ({}, {"authorization": "Bearer wrong"}):
            response = call(f"{server.url}{path}", headers=headers)
            assert response.status_code == 401, path
    key = {"authorization": f"Bearer {KEY}"}
    for _ in range(8):  # new connections, so that both processes get some
        state = httpx.get(f"{server.url}{ROUTE}", headers=key).raise_for_status().json()
        assert (state["family"], state["method"]["options"]["mu"]) == ("Qwen2-VL", 0.5744)
        limits = {name: state["limits"][name] for name in ("default", "max", "low", "detail")}
        assert limits == {"default": 0.5, "max": 40, "low": 8, "detail": True}
        assert state["fields"]["visual_token_method"]["enum"] == ["promprune", "random", "uniform", None]
    for fields in ({}, {"detail": ["low", "auto", "high"]}, {"visual_token_budget": ["full", 0.1, 5]}):
        _compare(server, key, fields)
    odd = {"images": [{"width": 60_000, "height": 1}]}
    refused = httpx.post(f"{server.url}{COUNT}", json=odd, headers=key)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "images"


def test_of_all_processes_one_warns_of_a_borrowed_mu(guarded_server: Server) -> None:
    """Of two API servers, an engine and a worker."""
    until(lambda: "promprune calibrate" in guarded_server.log.read_text())  # the other may be healthy before
    lines = guarded_server.log.read_text().splitlines()
    assert sum("PromPrune keeps 50% tokens" in line for line in lines) == 2, "each API server says what it does"
    (line,) = (line for line in lines if "promprune calibrate" in line)
    assert "WARNING" in line
    assert "mu = 0.5744 (Qwen2.5-VL's; not measured for this tower)" in line
    assert f"`promprune calibrate {guarded_server.log.parent / 'model'} --images DIR`" in line


def _compare(server: Server, key: dict[str, str], fields: dict[str, Any]) -> None:
    shapes = [(224, 168), (300, 100), (56, 280)]
    details = fields.get("detail", ["auto"] * 3)
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": _jpeg(*shape), "detail": detail}}
        for shape, detail in zip(shapes, details, strict=True)
    ]
    request = body(max_tokens=1, **{name: value for name, value in fields.items() if name != "detail"})
    request["messages"][0]["content"] = [*parts, *request["messages"][0]["content"]]
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=request, headers=key, timeout=120)
    assert reply.status_code == 200, reply.text
    used = reply.json()["usage"]["visual_tokens"]
    images = [{"width": width, "height": height} for width, height in shapes]
    counted = httpx.post(f"{server.url}{COUNT}", json={"images": images, **fields}, headers=key).json()
    assert {name: counted[name] for name in used} == used
    assert len({image["seen"] for image in used["images"]}) == 3, "these images should differ in their tokens"
    assert used["kept"] < used["seen"]


def test_the_inspector_asks_for_the_key_and_sends_it(guarded_server: Server) -> None:
    """A grid of merged patches, too, and a budget that the server's limits lower."""
    (size,) = sizes("rocket")
    key = {"authorization": f"Bearer {KEY}"}
    counted = httpx.post(f"{guarded_server.url}{COUNT}", json={"images": [size]}, headers=key).json()
    with chromium() as browser:
        from playwright.sync_api import expect

        page = browser.new_page()
        page.goto(f"{guarded_server.url}/promprune")
        expect(page.locator("#error")).to_contain_text("API key")
        for early in ({"name": "a.mp4", "mimeType": "video/mp4", "buffer": b"a video"}, photo_path("rocket")):
            page.set_input_files("#file", early)  # nobody knows yet what the server takes
            expect(page.locator("#picture")).to_have_attribute("aria-busy", "false")
            expect(page.locator("#error")).to_contain_text("API key")
            expect(page.locator("#send")).to_be_disabled()
        page.click("#key-row summary")
        page.fill("#key", KEY)
        page.locator("#key").press("Tab")
        expect(page.locator("rect.cell")).to_have_count(counted["seen"], timeout=120_000)
        expect(page.locator("#error")).to_be_hidden()
        expect(page.locator("#send")).to_be_enabled()
        expect(page.locator("rect.cell:not(.dropped)")).to_have_count(40)


def test_an_answer_has_no_confidence_where_there_are_no_logprobs(guarded_server: Server) -> None:
    inspect, key = f"{guarded_server.url}{ROUTE}/inspect", {"authorization": f"Bearer {KEY}"}
    request = {"image": _jpeg(224, 168), "text": "What is it?"}
    told = httpx.post(inspect, json=request, headers=key, timeout=120).raise_for_status().json()
    assert told["answer"]["text"]
    assert (told["answer"]["confidence"], told["answer"]["below"], told["answer"]["first"]) == (None, None, None)
    refused = httpx.post(inspect, json={**request, "visual_token_escalate": 0.9}, headers=key, timeout=120)
    assert refused.status_code == 400
    assert "--max-logprobs 0" in refused.json()["error"]["message"]


def test_logs_hold_no_images_prompts_or_keys(guarded_server: Server) -> None:
    chat, key = f"{guarded_server.url}/v1/chat/completions", {"authorization": f"Bearer {KEY}"}
    asked = body("coffee", question="Is this the patient Ada Example?", visual_token_budget=64)
    wrong = {**asked, "visual_token_budget": "Ada Example's budget"}
    for each, status in ((asked, 200), (wrong, 400), ({**asked, "stream": True}, 200)):
        assert httpx.post(chat, json=each, headers=key, timeout=60).status_code == status
    assert httpx.post(chat, json=asked, timeout=60).status_code == 401
    log = guarded_server.log.read_text()
    image = asked["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    assert "promprune" in log
    for secret in (KEY, "Ada Example", "base64,", image[:40], image[2000:2040]):
        assert secret not in log
