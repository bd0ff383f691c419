"""Requests made from the server's own API document: whatever a client sends, never a 5xx.

First our own fields by their schemas; then everything that vLLM takes, on every route, compared with a server
without the plugin. A commit sends a hundred of each, a release 1,500, and ``PROMPRUNE_FUZZ=20000`` so many.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx
import pytest
import requests
from PIL import Image
from schemathesis import Case, GenerationMode

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.families import build_family_model
from promprune_vllm.demo.server import Server, is_healthy
from promprune_vllm.server.route_table import POST_ROUTES
from tests.server.conftest import MODEL, _serving, ask, saved
from tests.server.fuzz_compare import Judge, table
from tests.server.fuzz_made import Made, bodies, made, posts
from tests.server.fuzz_parts import BASES, LEFT_OUT, named_first, rendered

pytestmark = pytest.mark.server
SEED = 20261120
CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
STATE, COUNT = "/v1/visual_tokens", "/v1/visual_tokens/count"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
FIELDS = ("visual_token_budget", "visual_token_method")
SENDERS = 8
BODIES = {"commit": 100, "release": int(os.environ.get("PROMPRUNE_FUZZ", "1500"))}
"""Made-up bodies on all routes, over both families."""
SHARE = {"commit": 10, "release": 1}
"""Of `PLAN`, one request in so many is made."""
every_tier = pytest.mark.parametrize("tier", ["commit", pytest.param("release", marks=pytest.mark.release)])
FAMILIES = ("llava", "qwen2_5_vl")
# What is off by default and adds routes or fields.
MORE = (
    *("--enable-scale-out", "--scheduling-policy", "priority"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
# Requests that follow the document, and requests that break it: 5,000 in all.
PLAN = {COUNT: (1800, 1700), CHAT: (250, 350), TOKENIZE: (450, 450)}


def _photograph() -> str:
    """A photograph of a few kilobytes, so that sending it takes no time."""
    with Image.open(photo_path("coffee")) as photo:
        return saved(photo.convert("RGB").resize((96, 64)), "JPEG")


def _fixed(path: str) -> dict[str, Any]:
    """What a request to a route always says; the rest is made up."""
    if path == COUNT:
        return {"images": [{"width": 640, "height": 480}]}
    if path == RESPONSES:
        return {"model": MODEL, "input": "What?", "max_output_tokens": 1}
    if path == MESSAGES:
        return {"model": MODEL, "messages": [{"role": "user", "content": "What?"}], "max_tokens": 1}
    parts = [
        {"type": "image_url", "image_url": {"url": _photograph()}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    request = {"model": MODEL, "messages": [{"role": "user", "content": parts}]}
    return {**request, "max_tokens": 1} if path == CHAT else request


def _document(server: Server) -> dict[str, Any]:
    """The server's own document, with requests of vLLM's routes reduced to our fields."""
    document: dict[str, Any] = httpx.get(f"{server.url}/openapi.json", timeout=60).raise_for_status().json()
    schemas = document["components"]["schemas"]
    for path, name in ((CHAT, "ChatCompletionRequest"), (TOKENIZE, "TokenizeChatRequest")):
        ours = {field: schemas[name]["properties"][field] for field in FIELDS}
        reduced = {"type": "object", "properties": ours, "minProperties": 1, "additionalProperties": False}
        document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"] = reduced
    return document


def _cases(
    document: dict[str, Any], path: str, mode: GenerationMode, number: int, method: str = "POST"
) -> list[Case]:
    cases = made(document, path, mode, number, seed=SEED, method=method)
    for i, case in enumerate(cases):
        # Every other count keeps the images that were made up for it.
        if isinstance(case.body, dict) and (path != COUNT or i % 2):
            case.body = {**case.body, **_fixed(path)}
    return cases


def _sender(server: Server) -> Callable[[Case], tuple[int, str]]:
    local = threading.local()

    def send(case: Case) -> tuple[int, str]:
        if not hasattr(local, "session"):
            local.session = requests.Session()
        response = case.call(base_url=server.url, session=local.session, timeout=120)
        return response.status_code, f"{case.body!r:.300} -> {response.status_code} {response.text:.300}"

    return send


@pytest.mark.timeout(400)
@every_tier
def test_generated_requests_never_hurt_the_server(server: Server, tier: str) -> None:
    document = _document(server)
    cases = [
        case
        for path, numbers in PLAN.items()
        for mode, number in zip((GenerationMode.POSITIVE, GenerationMode.NEGATIVE), numbers, strict=True)
        for case in _cases(document, path, mode, number // SHARE[tier])
    ]
    assert len(cases) >= 5000 // SHARE[tier]
    # A route without parameters: there is one request, and nothing to break.
    cases += _cases(document, STATE, GenerationMode.POSITIVE, 1, "GET") * 20
    with ThreadPoolExecutor(SENDERS) as pool:
        replies = list(pool.map(_sender(server), cases))
    failures = [shown for status, shown in replies if status >= 500]
    assert not failures, "\n".join(failures[:10])
    statuses = Counter((case.path, status) for case, (status, _) in zip(cases, replies, strict=True))
    assert {status for _, status in statuses} == {200, 400}
    assert statuses[STATE, 200] == 20
    for path in PLAN:  # neither refused nor accepted wholesale
        assert min(statuses[path, 200], statuses[path, 400]) >= 50 // SHARE[tier], statuses
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert ask(server, "coffee", visual_token_budget=64)["usage"]["visual_tokens"]["kept"] == 64


RAW = [
    *(
        "NaN",
        "-Infinity",
        "1e999",
        "1e-999",
        "-0.0",
        "[NaN]",
        '"\\ud800"',
        '["\\udfff"]',
        '"\\u0000"',
        '"\\u0660%"',
    ),
    *('{"total": NaN}', '{"\\ud800": 1}', '"' + "9" * 200_000 + '%"', "[" + "1," * 5000 + "1]"),
    *(
        "9" * 4000,
        "9" * 5000,
        *("[" * depth + "]" * depth for depth in (50, 500, 700, 800, 850, 900, 950, 990, 5000)),
    ),
]


@pytest.mark.parametrize("path", [*PLAN, RESPONSES, MESSAGES])
@pytest.mark.parametrize("field", FIELDS)
def test_json_that_no_schema_makes_is_refused(server: Server, path: str, field: str) -> None:
    start = json.dumps(_fixed(path)).removesuffix("}")
    for value in RAW:
        response = httpx.post(
            f"{server.url}{path}",
            content=f'{start}, "{field}": {value}}}',
            headers={"content-type": "application/json"},
            timeout=60,
        )
        assert response.status_code == 400, f"{value[:40]} ({len(value)}): {response.text[:300]}"


HALF = '{"visual_token_budget": 64'
BYTES = {
    "utf-16": HALF.encode("utf-16"),
    "utf-32": HALF.encode("utf-32-be"),
    "byte-order mark": b"\xef\xbb\xbf" + HALF.encode(),
    "latin-1": '{"visual_token_budget": "½"'.encode("latin-1"),
    "overlong utf-8": b'{"visual_token_budget": "\xc0\xb1"',
    "null bytes": b"\x00" * 64 + HALF.encode(),
    "the key twice": b'{"visual_token_budget": 64, "visual_token_budget": [[]]',
    "full-width digits": '{"visual_token_budget": "\uff16\uff14"'.encode(),
    "other line ends": HALF.replace(" ", "\r\n\u2028").encode(),
    "a comment": b'{"visual_token_budget": 64 /* all of them */',
}


@pytest.mark.parametrize("path", PLAN)
@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_json_or_another_are_refused(server: Server, path: str, name: str) -> None:
    rest = ", " + json.dumps(_fixed(path)).removeprefix("{")
    encoding = {"utf-16": "utf-16-le", "utf-32": "utf-32-be"}.get(name, "utf-8")
    response = httpx.post(
        f"{server.url}{path}",
        content=BYTES[name] + rest.encode(encoding),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert response.status_code in (200, 400), response.text[:300]
    if response.status_code == 200:  # Python's json finds out by itself what Unicode it is
        assert name in ("utf-16", "utf-32", "byte-order mark")


Pair = tuple[Server, Server]


@pytest.fixture(scope="module")
def mrope(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A family whose positions have three axes, with more of vLLM switched on; ours, and stock vLLM."""
    directory = tmp_path_factory.mktemp("mrope")
    model = build_family_model("qwen2_5_vl", directory / "model")
    start = contextmanager(_serving)
    with (
        start(model, tmp_path_factory.mktemp("ours"), *MORE) as ours,
        start(model, tmp_path_factory.mktemp("plain"), *MORE, VLLM_PLUGINS="") as plain,
    ):
        yield ours, plain


@pytest.fixture(scope="module")
def pairs(server: Server, stock: Server, mrope: Pair) -> dict[str, Pair]:
    """By family: a server of ours and one without the plugin, else the same."""
    return dict(zip(FAMILIES, ((server, stock), mrope), strict=True))


@pytest.fixture(scope="module")
def made_up(mrope: Pair) -> Callable[[str], Made]:
    """Fields of the routes of both families; the second has all routes of the first."""
    document = httpx.get(f"{mrope[0].url}/openapi.json", timeout=60).raise_for_status().json()
    return cache(lambda tier: Made(document, 4 + BODIES[tier] // 200, SEED))


def test_every_route_is_fuzzed_or_has_its_reason(pairs: dict[str, Pair]) -> None:
    for ours, _ in pairs.values():
        document = httpx.get(f"{ours.url}/openapi.json", timeout=60).raise_for_status().json()
        assert not posts(document) - set(BASES) - set(LEFT_OUT)
    assert not set(BASES) & set(LEFT_OUT)
    left_out = {path for path in LEFT_OUT if POST_ROUTES[path].effect != "no image"}
    assert not left_out, "these carry images"


@pytest.mark.timeout(600 + BODIES["release"])
@every_tier
@pytest.mark.parametrize("family", FAMILIES)
def test_what_stock_vllm_answers_is_answered_or_refused_with_a_reason(
    pairs: dict[str, Pair], made_up: Callable[[str], Made], family: str, tier: str
) -> None:
    """Bodies on all routes, each sent to a stock server without our fields: see `Judged.faults`."""
    ours, plain = pairs[family]
    for each in (ours, plain):
        named_first(each)
    document = httpx.get(f"{ours.url}/openapi.json", timeout=60).raise_for_status().json()
    paths = sorted(posts(document) & set(BASES))
    sent = bodies(made_up(tier), paths, BODIES[tier] // len(FAMILIES), SEED, rendered(ours, plain))
    judged = Judge(ours, plain).all(sent)
    print(table(judged))
    assert is_healthy(ours.url)
    faults = [each.shown() for each in judged if each.faults()]
    assert not faults, f"{len(faults)} of {len(judged)}:\n" + "\n".join(faults[:5])
    accepted = sum(each.with_fields.status == 200 for each in judged) / len(judged)
    assert 0.3 < accepted < 0.7  # neither refused nor accepted wholesale
    assert is_healthy(plain.url), "a body that ends stock vLLM compares nothing: leave it out, with the reason"
