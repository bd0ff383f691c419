"""What the table of routes says is so: on every kind of server, on each route that it serves."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from promprune_vllm.demo.model import DemoModelSpec, build_demo_model
from promprune_vllm.demo.server import Server, free_port, is_healthy, wait_until_healthy
from promprune_vllm.server.openapi import request_schemas
from promprune_vllm.server.route_table import POST_ROUTES
from tests.conftest import UNMEASURED
from tests.server.conftest import MODEL, _serving, grown, image_url, measured, post, series
from tests.server.requests_by_route import (
    BODIES,
    COUNTED,
    ELSEWHERE,
    IMAGE,
    INSPECTED,
    MESSAGES,
    NO_USAGE,
    SHORT,
    TEXT,
)
from tests.server.test_reply import headers

pytestmark = pytest.mark.server
FULL, DEFAULT, ASKED = 16, 4, 7
"""Tokens of the small model's images: all, those of the server's default of 25%, and those that tests ask for."""
SPEC = DemoModelSpec(image_px=56, hidden=64, heads=2, mlp=128, layers=2)
BUDGET, METHOD, ESCALATE = "visual_token_budget", "visual_token_method", "visual_token_escalate"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_model(tmp_path_factory.mktemp("small") / "model", SPEC)


@pytest.fixture(scope="module")
def generating(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with every route of generation, those for scaling out included, and a default for all images."""
    options, variables = measured()
    words = ("--enable-scale-out", "--visual-token-budget", "25%", *options)
    yield from _serving(model, tmp_path_factory.mktemp("generating"), *words, **variables)


@pytest.fixture(scope="module")
def pooling(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--runner", "pooling", "--visual-token-budget", "25%")
    yield from _serving(model, tmp_path_factory.mktemp("pooling"), *options)


@contextmanager
def process(arguments: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """vLLM's command line with the plugin, ended with the block."""
    code = "import sys; from promprune_vllm.commands.vllm_cli import run; run(sys.argv[1:])"
    with log.open("wb") as output:
        running = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **UNMEASURED, **environment},
        )
    try:
        yield running
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(60)


@pytest.fixture(scope="module")
def rendering(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's server without an engine, which renders prompts for others."""
    log, port = tmp_path_factory.mktemp("rendering") / "log", free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "2048"]
    command = ["launch", "render", str(model), "--served-model-name", MODEL, *options]
    with process(command, log, PROMPRUNE_BUDGET="25%", **measured()[1]) as running:
        server = Server(f"http://127.0.0.1:{port}", log, running)
        wait_until_healthy(server)
        yield server


KINDS = ("generating", "pooling", "rendering")


def document(server: Server) -> dict[str, Any]:
    made: dict[str, Any] = httpx.get(f"{server.url}/openapi.json", timeout=60).raise_for_status().json()
    return made


def served(server: Server) -> set[str]:
    """Return the routes that are asked here. A render server has /invocations, but nothing to hand requests to."""
    paths = post_routes(document(server)) & BODIES.keys()
    return paths if {"/v1/chat/completions", "/v1/embeddings"} & paths else paths - {"/invocations"}


def post_routes(made: dict[str, Any]) -> set[str]:
    return {path for path, methods in made["paths"].items() if "post" in methods}


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


every_kind = pytest.mark.parametrize("kind", KINDS, indirect=True)


def test_every_route_that_obeys_is_asked_here_or_says_why_not() -> None:
    obeying = {path for path, route in POST_ROUTES.items() if route.effect == "obeys"}
    assert obeying - {"/v1/completions"} == BODIES.keys() | ELSEWHERE.keys()


@every_kind
def test_the_table_knows_every_route_of_the_server(kind: Server) -> None:
    unknown = post_routes(document(kind)) - POST_ROUTES.keys()
    assert not unknown, f"say in server/route_table.py what a budget does on {sorted(unknown)}"


@every_kind
def test_the_document_shows_the_fields_where_they_are_obeyed(kind: Server) -> None:
    made = document(kind)
    schemas = made["components"]["schemas"]
    taking = request_schemas(made)
    assert taking
    for name in taking:
        assert {BUDGET, METHOD} <= schemas[name]["properties"].keys(), name
    again = {name for name in taking if ESCALATE in schemas[name]["properties"]}
    assert again == set(request_schemas(made, ESCALATE))


def asked(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The same fields in both of the places where they are read."""
    return [fields, {"vllm_xargs": fields}]


@every_kind
def test_every_route_obeys_and_tells(kind: Server) -> None:
    paths = served(kind)
    assert len(paths) >= 4
    ways: list[tuple[dict[str, Any], int]] = [
        ({}, DEFAULT),
        ({BUDGET: None}, DEFAULT),
        ({BUDGET: "auto"}, DEFAULT),
    ]
    ways += [(more, kept) for value, kept in (("full", FULL), (ASKED, ASKED)) for more in asked({BUDGET: value})]
    ways += [({BUDGET: str(ASKED)}, ASKED), ({BUDGET: {"total": ASKED}, METHOD: "promprune"}, ASKED)]
    for path in sorted(paths):
        for more, kept in ways:
            response = post(kind, path, {**BODIES[path], **more})
            assert response.status_code == 200, f"{path} {more}: {response.text}"
            assert headers(response) == (str(FULL), str(kept)), f"{path} {more}"
            usage = response.json().get("usage") if isinstance(response.json(), dict) else None
            assert (path in NO_USAGE) == (usage is None), path
            if usage is not None:
                assert usage["visual_tokens"]["kept"] == kept, f"{path} {more}"


BAD: list[tuple[dict[str, Any], str]] = [
    *((more, BUDGET) for value in (-3, "most", True, []) for more in asked({BUDGET: value})),
    *((more, METHOD) for more in asked({METHOD: "nope"})),
    ({BUDGET: 4, "vllm_xargs": {BUDGET: 5}}, BUDGET),
    ({"visual_tokens_budget": 4}, "visual_tokens_budget"),
    ({"extra_body": {BUDGET: 4}}, BUDGET),
    *(({"vllm_xargs": {BUDGET: value}}, BUDGET) for value in (None, {"total": ASKED})),
]


@every_kind
def test_every_route_refuses_what_is_no_budget(kind: Server) -> None:
    others = {"/v1/completions", "/v1/systemone", "/invocations"} & post_routes(document(kind))
    for path in sorted(served(kind) | others):
        before = series(kind)
        for more, param in BAD:
            response = post(kind, path, {**BODIES.get(path, {"model": MODEL, "prompt": "x"}), **more})
            assert response.status_code == 400, f"{path} {more}: {response.text}"
            assert response.json()["error"]["param"] == param, f"{path} {more}"
        refused = grown(series(kind), before)
        assert refused["promprune_requests_total", "refused"] == len(BAD), path
    assert is_healthy(kind.url)


@every_kind
def test_every_route_takes_a_second_try_or_refuses_it_by_name(kind: Server) -> None:
    """Also the routes that take no image, and those that no server here can answer: they refuse before that."""
    bodies, tried = {**BODIES, "/v1/visual_tokens/inspect": INSPECTED}, set()
    for path in sorted(post_routes(document(kind)) - {"/v1/visual_tokens/count"}):
        response = post(kind, path, {**bodies.get(path, {}), ESCALATE: 0.5})
        error, answers = response.json().get("error", {}), POST_ROUTES[path].asks_again
        if not answers:
            assert response.status_code == 400, f"{path}: {response.text}"
            assert (error["param"], f"{path} generates no answer" in error["message"]) == (ESCALATE, True), path
            assert path not in served(kind) or post(kind, path, {**BODIES[path], ESCALATE: False}).is_success, path
        elif path == "/invocations" and "/v1/embeddings" in served(kind):
            assert (error["param"], "asks for no answer" in error["message"]) == (ESCALATE, True), path
        else:  # whatever else may be wrong with the request
            assert error.get("param") != ESCALATE, f"{path}: {response.text}"
            wrong = post(kind, path, {**bodies.get(path, {}), ESCALATE: 2})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, ESCALATE), path
        tried.add(answers)
    assert tried == {True, False}
    counted = post(kind, "/v1/visual_tokens/count", {"images": [{"width": 8, "height": 8}], ESCALATE: 0.5})
    assert counted.status_code == 400
    assert ESCALATE in counted.text


def test_an_unsure_answer_is_asked_for_again_on_every_route_that_answers(generating: Server) -> None:
    for path in sorted(served(generating)):
        if POST_ROUTES[path].asks_again and path not in NO_USAGE:
            response = post(generating, path, {**BODIES[path], BUDGET: ASKED, ESCALATE: 1})
            assert response.status_code == 200, response.text
            used = response.json()["usage"]["visual_tokens"]
            (first,) = used["first_tries"]
            assert (used["kept"], first["kept"], first["asked_again"]) == (FULL, ASKED, True), path


def test_a_prompt_of_every_route_is_counted_once(generating: Server, pooling: Server) -> None:
    for server, path in ((generating, "/v1/messages"), (generating, "/invocations"), (pooling, "/v1/embeddings")):
        before = series(server)
        assert post(server, path, {**BODIES[path], BUDGET: ASKED}).status_code == 200
        counted = grown(series(server), before)
        assert counted["promprune_requests_total", "pruned"] == 1, path
        assert counted["promprune_visual_tokens_seen_total", "promprune", "image"] == FULL, path
        assert counted["promprune_visual_tokens_kept_total", "promprune", "image"] == ASKED, path
        assert counted["promprune_budgets_total", "tokens"] == 1, path


@pytest.mark.parametrize("budget", [None, "full", 1, ASKED, "50%"])
def test_counting_tokens_agrees_with_the_messages_themselves(generating: Server, budget: Any) -> None:
    fields = {} if budget is None else {BUDGET: budget}
    counted = post(generating, "/v1/messages/count_tokens", {**COUNTED, **fields}).json()["input_tokens"]
    assert counted == post(generating, "/v1/messages", {**MESSAGES, **fields}).json()["usage"]["input_tokens"]


def test_each_conversation_of_a_batch_has_its_own_images(generating: Server) -> None:
    two = {"role": "user", "content": [IMAGE, IMAGE, TEXT]}
    batch = {**SHORT, "messages": [[two], [two]]}
    response = post(generating, "/v1/chat/completions/batch", {**batch, BUDGET: [ASKED, "full"]})
    assert headers(response) == (str(4 * FULL), str(2 * (ASKED + FULL)))
    refused = post(generating, "/v1/chat/completions/batch", {**batch, BUDGET: [1, 2, 3, 4]})
    assert refused.status_code == 400
    assert "In batched chat and scoring requests" in refused.json()["error"]["message"]


def _rendered(server: Server, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = (
        post(server, "/v1/chat/completions/render", {**SHORT, **fields}).raise_for_status().json()
    )
    return made


@pytest.mark.parametrize("elsewhere", [True, False], ids=["rendered elsewhere", "rendered here"])
def test_features_keep_what_their_render_server_was_asked_for(
    generating: Server, rendering: Server, elsewhere: bool
) -> None:
    for fields, kept in (({}, DEFAULT), ({BUDGET: ASKED}, ASKED), ({BUDGET: "full"}, FULL)):
        features = _rendered(rendering if elsewhere else generating, **fields)
        before = series(generating)
        response = post(generating, "/inference/v1/generate", features)
        assert response.status_code == 200, response.text
        assert headers(response) == (str(FULL), str(kept))
        assert response.json()["usage"]["visual_tokens"]["kept"] == kept
        counted = grown(series(generating), before)
        assert counted["promprune_requests_total", "full" if kept == FULL else "pruned"] == 1
        chat = post(generating, "/v1/chat/completions", {**SHORT, **fields, "return_token_ids": True}).json()
        assert response.json()["choices"][0]["token_ids"] == chat["choices"][0]["token_ids"]


def test_a_budget_beside_features_comes_too_late(generating: Server) -> None:
    features = _rendered(generating)
    for fields in asked({BUDGET: ASKED}) + asked({METHOD: "promprune"}):
        response = post(generating, "/inference/v1/generate", {**features, **fields})
        assert response.status_code == 400, response.text
        assert "to its render route" in response.json()["error"]["message"]
    for fields in asked({ESCALATE: 0.5}):  # which render routes refuse
        response = post(generating, "/inference/v1/generate", {**features, **fields})
        assert response.status_code == 400, response.text
        assert "Leave it out." in response.json()["error"]["message"]
    assert post(generating, "/inference/v1/generate", {**features, ESCALATE: False}).status_code == 200


def test_content_parts_obey(generating: Server) -> None:
    text = "USER: <image>\nWhat is it? ASSISTANT:"
    ids = post(generating, "/tokenize", {"model": MODEL, "prompt": text}).json()["tokens"]
    parts = [{"type": "image_url", "url": image_url("coffee")}]
    request = {"token_ids": ids, "content_parts": parts, "sampling_params": {"max_tokens": 1}}
    for more, kept in [({}, DEFAULT), *((way, ASKED) for way in asked({BUDGET: ASKED}))]:
        response = post(generating, "/inference/v1/generate", {**request, **more})
        assert headers(response) == (str(FULL), str(kept)), response.text
        assert response.json()["usage"]["visual_tokens"]["kept"] == kept
    for more in asked({BUDGET: -3}) + asked({METHOD: "nope"}):
        assert post(generating, "/inference/v1/generate", {**request, **more}).status_code == 400
    misplaced = {**request, "content_parts": [{**parts[0], BUDGET: ASKED}]}
    assert post(generating, "/inference/v1/generate", misplaced).status_code == 400


COUNTS = {
    "another placeholder": [FULL, ASKED + 1, 0],
    "more than there are": [ASKED - 1, ASKED, 0],
    "no tokens": [0, 0, 0],
    "a method that is not there": [FULL, ASKED, 3],
    "a negative method": [FULL, ASKED, -1],
    "another shape": [FULL, ASKED],
    "a deeper shape": [[FULL, ASKED, 0]],
}


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_features_with_counts_that_cannot_be_are_refused(generating: Server, counts: list[Any]) -> None:
    request = tampered(_rendered(generating, visual_token_budget=ASKED), "image", "visual_token_counts", counts)
    response = post(generating, "/inference/v1/generate", request)
    assert response.status_code == 400, response.text
    assert "features of an image cannot be used" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "features"


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_features_with_wrong_text_or_totals_do_not_end_the_engine(generating: Server) -> None:
    made = _rendered(generating, visual_token_budget=ASKED)
    for tokens in ([10**9], [-1], [1] * 5000):
        request = tampered(made, "image", "visual_token_text", tokens)
        response = post(generating, "/inference/v1/generate", request)
        assert response.status_code == 400, response.text
    # How many tokens an image has is only known to who encodes it: the request fails there, and it alone.
    wrong = tampered(made, "image", "visual_token_counts", [FULL + 1, ASKED, 0])
    assert post(generating, "/inference/v1/generate", wrong).status_code == 500
    assert is_healthy(generating.url)
    assert post(generating, "/inference/v1/generate", _rendered(generating)).status_code == 200


def tampered(request: dict[str, Any], kind: str, field: str, value: list[Any]) -> dict[str, Any]:
    """Features with another value of a field of the first image or video, under a key that no cache has."""
    import torch
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import decode_mm_kwargs_item, encode_mm_kwargs_item

    request = copy.deepcopy(request)
    features = request["features"]
    for part in ("kwargs_data", "mm_metadata"):
        item = decode_mm_kwargs_item(features[part][kind][0])
        if field in item:
            item[field].data = torch.tensor(value)
        features[part][kind][0] = encode_mm_kwargs_item(item)
    features["mm_hashes"][kind] = [f"tampered-{field}-{value}"[:60]]
    return request


def test_what_a_server_cannot_do_it_says(pooling: Server, rendering: Server) -> None:
    for server, path in ((pooling, "inspect"), (rendering, "inspect")):
        response = post(server, f"/v1/visual_tokens/{path}", {**INSPECTED, BUDGET: ASKED})
        assert response.status_code == 501, response.text
        assert "does not answer chat requests" in response.json()["error"]["message"]
    caches = httpx.get(f"{rendering.url}/v1/visual_tokens/caches")
    assert caches.status_code == 501
    assert "no engine" in caches.json()["error"]["message"]
    for server, reason in ((pooling, "--runner pooling"), (rendering, "a render server has no answers")):
        state = httpx.get(f"{server.url}/v1/visual_tokens").json()
        assert state["prunable"] is True
        assert reason in state["audit"]["reason"]


def test_a_batch_file_obeys_and_tells(model: Path, tmp_path: Path) -> None:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": {**SHORT, **more}}
        for i, more in enumerate(
            ({}, {BUDGET: ASKED}, {"vllm_xargs": {BUDGET: "full"}}, {BUDGET: -3}, {BUDGET: ASKED, ESCALATE: 1})
        )
    ]
    asked_file, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked_file.write_text("\n".join(json.dumps(line) for line in lines))
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--block-size", "32"]
    command = ["run-batch", "-i", str(asked_file), "-o", str(answers), "--model", str(model), *options]
    with process([*command, "--served-model-name", MODEL], tmp_path / "log", PROMPRUNE_BUDGET="25%") as running:
        assert running.wait(500) == 0, (tmp_path / "log").read_text()[-3000:]
    replies = {line["custom_id"]: line for line in map(json.loads, answers.read_text().splitlines())}
    for i, kept in enumerate((DEFAULT, ASKED, FULL)):
        body = replies[str(i)]["response"]["body"]
        assert body["usage"]["visual_tokens"] == {
            "seen": FULL,
            "kept": kept,
            "images": [{"seen": FULL, "kept": kept}],
        }
    unsure = replies["4"]["response"]["body"]["usage"]["visual_tokens"]
    assert (unsure["kept"], unsure["first_tries"][0]["kept"]) == (FULL, ASKED)
    assert replies["3"]["response"]["status_code"] == 400
    assert BUDGET in json.dumps(replies["3"]["error"])
