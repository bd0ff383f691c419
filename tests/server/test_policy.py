"""What the operator sets: default, limits, OpenAI's detail, further methods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from promprune_vllm.demo.model import DemoModelSpec, build_demo_model
from promprune_vllm.demo.server import Server
from promprune_vllm.errors import BudgetError
from tests.conftest import QUESTION
from tests.server.conftest import MODEL, _serving, ask, body, image_url, post
from tests.server.requests_by_route import BODIES
from tests.server.test_named import answer, named, sent
from tests.server.test_reply import headers

pytestmark = pytest.mark.server
POLICY = (
    *("--visual-token-budget", "50%", "--visual-token-min", "4", "--visual-token-max", "400"),
    *("--visual-token-low", "32", "--visual-token-detail", "--allow-methods", "divprune,cdpruner"),
    "--no-inspector",
)


@pytest.fixture(scope="module")
def policy_server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _serving(demo_model, tmp_path_factory.mktemp("policy"), *POLICY)


def _kept(server: Server, **fields: Any) -> int:
    """Visual tokens of a request with one image; all else in the prompt is the same."""
    detail = fields.pop("detail", None)
    request = body("coffee", **fields)
    if detail is not None:
        request["messages"][0]["content"][0]["image_url"]["detail"] = detail
    response = post(server, "/v1/chat/completions", request)
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens"]) - _text(server)


def _text(server: Server) -> int:
    return int(ask(server, "coffee", visual_token_budget=4)["usage"]["prompt_tokens"]) - 4


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, 288),
        ({"visual_token_budget": "auto"}, 288),
        ({"visual_token_budget": 100}, 100),
        ({"visual_token_budget": 1}, 4),
        ({"visual_token_budget": "full"}, 400),
        ({"detail": "low"}, 32),
        ({"detail": "high"}, 400),
        ({"detail": "auto"}, 288),
        ({"detail": "low", "visual_token_budget": 77}, 77),
        ({"detail": "high", "visual_token_budget": "auto"}, 288),
    ],
    ids=str,
)
def test_what_an_image_keeps(policy_server: Server, fields: dict[str, Any], kept: int) -> None:
    by_uuid = sent(f"policy {fields}", **{name: value for name, value in fields.items() if name != "detail"})
    (part, *_), detail = by_uuid["messages"][0]["content"], fields.get("detail", "auto")
    part["image_url"]["detail"] = detail
    assert answer(policy_server, by_uuid)[0]["usage"]["visual_tokens"]["kept"] == kept
    by_name = named(by_uuid)
    by_name["messages"][0]["content"][0]["detail"] = detail
    assert answer(policy_server, by_name)[0]["usage"]["visual_tokens"]["kept"] == kept
    assert _kept(policy_server, **fields) == kept


def test_detail_counts_for_each_image_and_on_responses(policy_server: Server) -> None:
    request = body("coffee", "rocket")
    request["messages"][0]["content"][1]["image_url"]["detail"] = "low"
    both = post(policy_server, "/v1/chat/completions", request).json()["usage"]["prompt_tokens"]
    plain = ask(policy_server, "coffee", "rocket")["usage"]["prompt_tokens"]
    assert plain - both == 288 - 32
    parts = [
        {"type": "input_image", "image_url": image_url("coffee"), "detail": detail} for detail in ("low", "auto")
    ]
    lengths = []
    for part in parts:
        content = [part, {"type": "input_text", "text": QUESTION}]
        items = [{"role": "user", "content": content}]
        response = post(policy_server, "/v1/responses", {"model": MODEL, "input": items, "max_output_tokens": 16})
        lengths.append(response.json()["usage"]["input_tokens"])
    assert lengths[1] - lengths[0] == 288 - 32


def test_without_the_option_detail_changes_nothing(server: Server) -> None:
    request = body("coffee")
    request["messages"][0]["content"][0]["image_url"]["detail"] = "low"
    length = post(server, "/v1/chat/completions", request).json()["usage"]["prompt_tokens"]
    assert length == ask(server, "coffee")["usage"]["prompt_tokens"]


def test_a_request_chooses_among_the_allowed_methods(policy_server: Server) -> None:
    telling = {"return_token_ids": True, "max_tokens": 8, "visual_token_budget": 20}
    said = {}
    for method in (None, "promprune", "divprune", "cdpruner"):
        fields = {} if method is None else {"visual_token_method": method}
        answer = ask(policy_server, "coffee", **telling, **fields)
        said[method] = tuple(answer["choices"][0]["token_ids"])
    assert said[None] == said["promprune"]
    assert len(set(said.values())) > 1, "methods would make no difference"
    refused = post(policy_server, "/v1/chat/completions", body("coffee", visual_token_method="random"))
    assert refused.status_code == 400
    assert "promprune, divprune, cdpruner" in refused.json()["error"]["message"]


def test_without_the_inspector_there_is_no_page_and_no_endpoint(policy_server: Server) -> None:
    assert httpx.get(f"{policy_server.url}/promprune").status_code == 404
    assert post(policy_server, "/v1/visual_tokens/inspect", {"image": image_url("coffee")}).status_code == 404


NO_PRUNING = ("--visual-token-min", "1000000", "--visual-token-out-of-range", "refuse")


@pytest.mark.release  # a server of its own
def test_a_minimum_above_every_image_leaves_no_budget_to_clients(tmp_path: Path) -> None:
    """On every route of a server that prunes nothing: what drops a token is refused, all else is answered."""
    spec = DemoModelSpec(image_px=56, hidden=64, heads=2, mlp=128, layers=2)
    for served in _serving(
        build_demo_model(tmp_path / "model", spec), tmp_path, "--enable-scale-out", *NO_PRUNING
    ):
        paths = httpx.get(f"{served.url}/openapi.json", timeout=60).json()["paths"].keys() & BODIES.keys()
        assert len(paths) >= 8
        for path in sorted(paths):
            for pruning in (1, 15, "15", 0.5, "90%", {"total": 15}, [15]):
                budget = {"visual_token_budget": pruning}
                for refused in (
                    post(served, path, {**BODIES[path], **way}) for way in (budget, {"vllm_xargs": budget})
                ):
                    assert refused.status_code == 400, f"{path} {pruning}: {refused.text}"
            for whole in (None, 16, 576, "full", "100%", "99%", "auto"):
                response = post(served, path, {**BODIES[path], "visual_token_budget": whole})
                assert response.status_code == 200, f"{path} {whole}: {response.text}"
                assert headers(response) == ("16", "16"), f"{path} {whole}"


def test_features_outside_the_limits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a render server that prunes for one that does not."""
    import torch

    from promprune_vllm.config import Settings
    from promprune_vllm.engine.api_server.rendered_features import _checked_plan
    from promprune_vllm.engine.keys import COUNTS

    pruned, whole = ({COUNTS: SimpleNamespace(data=torch.tensor([16, kept, 0]))} for kept in (7, 16))
    monkeypatch.setenv("PROMPRUNE_MIN", "1000000")
    assert _checked_plan(whole, 16, Settings(), 300).kept == 16
    with pytest.raises(BudgetError, match="7 of 16 tokens are outside this server's limits"):
        _checked_plan(pruned, 7, Settings(), 300)


def test_features_with_an_identity_that_is_none_are_refused() -> None:
    """In the worker it would end the engine."""
    import torch

    from promprune_vllm.config import Settings
    from promprune_vllm.engine.api_server.rendered_features import _checked_plan
    from promprune_vllm.engine.keys import COUNTS, IDENTITY

    counts = SimpleNamespace(data=torch.tensor([16, 16, 0]))
    right = torch.arange(16, dtype=torch.uint8)
    assert _checked_plan({COUNTS: counts, IDENTITY: SimpleNamespace(data=right)}, 16, Settings(), 300).kept == 16
    for wrong in (right[:15], right.long(), right[None], [*range(16)]):
        with pytest.raises(BudgetError, match="visual_token_identity has a wrong shape or type"):
            _checked_plan({COUNTS: counts, IDENTITY: SimpleNamespace(data=wrong)}, 16, Settings(), 300)


def test_features_with_text_among_visual_tokens_are_refused() -> None:
    """The place of such a video has text in front of it, which is refused, unless a client has changed it."""
    import torch

    from promprune_vllm.config import Settings
    from promprune_vllm.core.budget import VIDEO
    from promprune_vllm.engine.api_server.rendered_features import _checked_plan
    from promprune_vllm.engine.keys import COUNTS, LAYOUT, field_of

    names = field_of(VIDEO, COUNTS), field_of(VIDEO, LAYOUT)
    values = torch.tensor([16, 7, 0]), torch.empty(0, dtype=torch.int64)
    item = {name: SimpleNamespace(data=value) for name, value in zip(names, values, strict=True)}
    assert _checked_plan(item, 7, Settings(), 300, VIDEO).kept == 7
    for wrong in (torch.tensor([-1, 5, -1]), torch.empty(0), [5], None):
        item[names[1]].data = wrong
        with pytest.raises(BudgetError, match="they have text among the visual tokens"):
            _checked_plan(item, 7, Settings(), 300, VIDEO)
