"""The fields' JSON schemas say what the parser does, and our routes work behind any backend."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st

from promprune_vllm.core.budget import MAX_BUDGET_TOKENS, MAX_IMAGES, BudgetRequest
from promprune_vllm.core.escalation import EscalationRequest
from promprune_vllm.errors import BudgetError
from promprune_vllm.server.field_schemas import budget_schema, escalation_schema, field_schemas, method_schema
from promprune_vllm.server.inspect_schemas import InspectRequest
from promprune_vllm.server.openapi import add_fields, document
from promprune_vllm.server.routes import PATH, router
from promprune_vllm.server.schemas import (
    Adaptation,
    Audit,
    CountReply,
    CountRequest,
    Escalation,
    ImageCount,
    Limits,
    Method,
    Range,
    Target,
    VisualTokens,
    VllmCheck,
)

VALIDATOR = jsonschema.Draft202012Validator(budget_schema())
DIGITS = st.text("0123456789", max_size=4)
ONE = st.one_of(
    st.integers(),
    st.integers(-2, 3),
    st.sampled_from([MAX_BUDGET_TOKENS - 1, MAX_BUDGET_TOKENS, MAX_BUDGET_TOKENS + 1]),
    st.floats(-1, 2),
    st.floats(allow_nan=False, allow_infinity=False),  # JSON has neither
    st.booleans(),
    st.sampled_from(["full", "auto", "Full", "", "%", "100%"]),
    st.builds("{}".format, st.integers(-2, MAX_BUDGET_TOKENS + 2)),
    st.builds("{}.{}".format, DIGITS, st.text("0123456789", max_size=11)),
    st.builds("{}%".format, DIGITS),
    st.builds("{}.{}%".format, DIGITS, st.text("0123456789", max_size=11)),
    st.text(),
)
KEYS = st.sampled_from(["per_frame", "total", "each"])
VALUE = st.one_of(
    ONE,
    st.lists(ONE, max_size=4),
    st.lists(st.none() | st.lists(ONE), min_size=1, max_size=2),
    st.dictionaries(KEYS, ONE | st.none()),
    st.lists(st.dictionaries(KEYS, ONE | st.none()), min_size=1, max_size=2),
)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(budget_schema())
    jsonschema.Draft202012Validator.check_schema(method_schema(["promprune"]))
    jsonschema.Draft202012Validator.check_schema(escalation_schema())


@settings(max_examples=400)
@given(ONE | st.dictionaries(st.sampled_from(["below", "to", "window"]), ONE | st.none()))
@example({"below": 0.9, "to": "full"})
@example({"below": "0.9", "to": "25%"})
@example({"to": "auto"})
@example({"to": {"per_frame": 8}})
@example({})
@example("1.0")
@example(1.0)
def test_the_schema_of_escalation_takes_what_the_parser_takes(value: object) -> None:
    try:
        EscalationRequest.parse(value)
        parsed = True
    except BudgetError:
        parsed = False
    if _beyond_json_schema(value):
        return
    assert jsonschema.Draft202012Validator(escalation_schema()).is_valid(value) == parsed


@settings(max_examples=400)
@given(VALUE)
@example("000.5%")
@example("1000000.0")
@example(1e6)
@example({"total": "64"})
@example({"per_frame": 32})
@example({"per_frame": "32.0"})
@example({"per_frame": 32, "total": 64})
@example(["auto", {"per_frame": 32}])
@example([{"total": 64}])
@example("100.000%")
@example("100.001%")
@example("0.000000000%")
@example([1] * MAX_IMAGES)
@example([1] * (MAX_IMAGES + 1))
def test_the_schema_takes_what_the_parser_takes(value: object) -> None:
    try:
        BudgetRequest.parse(value)
        parsed = True
    except BudgetError:
        parsed = False
    if _beyond_json_schema(value):
        assert not parsed
    else:
        assert VALIDATOR.is_valid(value) == parsed


def _beyond_json_schema(value: object) -> bool:
    """Python's ``$`` also stands before a last line end."""
    if isinstance(value, list | dict):
        entries = value.values() if isinstance(value, dict) else value
        return any(_beyond_json_schema(entry) for entry in entries)
    return isinstance(value, str) and value.endswith("\n")


@pytest.mark.parametrize("value", [*budget_schema()["examples"], None], ids=repr)
def test_examples_are_valid(value: object) -> None:
    assert VALIDATOR.is_valid(value)
    if value is not None:  # which is no budget at all
        BudgetRequest.parse(value)


def test_a_value_matches_one_form_only() -> None:
    for value in budget_schema()["examples"]:
        assert sum(jsonschema.Draft202012Validator(form).is_valid(value) for form in budget_schema()["oneOf"]) == 1


def test_fields_are_added_where_they_are_taken_and_nowhere_else() -> None:
    chat, ask = {"properties": {"model": {}}}, {"properties": {"visual_token_budget": {}}}
    schemas: dict[str, Any] = {"Chat": chat, "BudgetRequest": ask, "Text": {"properties": {}}, "Other": {}}
    schemas["Embedding"] = {"properties": {}}
    made: dict[str, Any] = {
        "paths": {
            "/v1/chat/completions": _posts("Chat", "Other"),
            "/v1/visual_tokens/inspect": _posts("BudgetRequest"),
            "/v1/embeddings": _posts("Embedding"),
            "/detokenize": _posts("Text"),
            "/somebody/elses": _posts("Text"),
        },
        "components": {"schemas": schemas},
    }
    for _ in range(2):
        add_fields(made, field_schemas(["promprune", "random"]))
        assert set(schemas) == {
            "Chat",
            "BudgetRequest",
            "Text",
            "Other",
            "Embedding",
            "visual_token_budget",
            "visual_token_method",
            "visual_token_escalate",
        }
        assert set(chat["properties"]) == {
            "model",
            "visual_token_budget",
            "visual_token_method",
            "visual_token_escalate",
        }
        assert ask["properties"]["visual_token_budget"] == {}, "what a route says itself stays"
        assert schemas["Text"]["properties"] == {}
        assert set(schemas["Embedding"]["properties"]) == {"visual_token_budget", "visual_token_method"}
        assert schemas["visual_token_method"]["enum"] == ["promprune", "random", None]
    empty: dict[str, Any] = {}
    add_fields(empty, field_schemas(["promprune"]))
    assert empty == {}


def _posts(*schemas: str) -> dict[str, Any]:
    references = [{"$ref": f"#/components/schemas/{name}"} for name in schemas]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"post": {"requestBody": {"content": {"application/json": {"schema": schema}}}}}


class _Backend:
    """Keeps everything it is asked for."""

    def state(self) -> VisualTokens:
        method = Method(name="promprune", options={"mu": 0.42})
        return VisualTokens(
            version="1",
            vllm_version="2",
            vllm_check=VllmCheck(tested=True, compared_with="2", compared=0, off=[], ignored=[]),
            model="m",
            architecture="a",
            family=None,
            prunable=False,
            reason="because",
            method=method,
            allowed_methods=[method],
            limits=Limits(
                default="full",
                min=1,
                max=None,
                videos=Range(default="full", min=1, max=None),
                low=64,
                out_of_range="clamp",
                floor=64,
                detail=False,
            ),
            escalation=Escalation(on=False, below=0.9, to="full", window=16, reason=None),
            audit=Audit(on=False, share=0, reason=None),
            target=Target(agreement=None, sizes=[]),
            adaptation=Adaptation(to_load=False, to_content=False, level=1.0),
            fields=field_schemas(["promprune"]),
        )

    async def count(self, body: CountRequest) -> CountReply:
        self.asked = body
        images = [ImageCount(seen=image.width, kept=image.height) for image in body.images or ()]
        return CountReply(seen=3, kept=2, images=images, videos=[], kv_cache=None)

    async def inspect(self, body: InspectRequest, request: Request) -> Response:
        return JSONResponse({"kept": body.visual_token_budget})


def test_the_routes_hand_on_what_was_sent() -> None:
    app = FastAPI()
    app.include_router(router(inspector=True))
    document(app, field_schemas(["promprune"]))
    app.state.visual_tokens = backend = _Backend()
    client = TestClient(app)
    assert client.get(PATH).json()["reason"] == "because"
    request = {"images": [{"width": 3, "height": 2}], "visual_token_budget": [0.25], "detail": ["low"]}
    assert client.post(f"{PATH}/count", json=request).json() == {
        "seen": 3,
        "kept": 2,
        "images": [{"seen": 3, "kept": 2}],
        "videos": [],
        "kv_cache": None,
    }
    assert backend.asked == CountRequest.model_validate(request)
    assert {PATH, f"{PATH}/count"} <= set(client.get("/openapi.json").json()["paths"])
    videos = {
        "videos": ["data:video/mp4;base64,"],
        "visual_token_budget": {"per_frame": 2},
        "visual_token_method": "evs",
    }
    assert client.post(f"{PATH}/count", json=videos).json()["images"] == []
    assert backend.asked == CountRequest.model_validate(videos)
    assert backend.asked.visual_token_method == "evs"
    for wrong in ({**request, "budget": 64}, {"images": []}, {"videos": []}, {"videos": [{"width": 3}]}):
        assert client.post(f"{PATH}/count", json=wrong).status_code == 422
    assert client.post(f"{PATH}/inspect", json={"image": "data:,", "visual_token_budget": 7}).json() == {"kept": 7}
    for wrong in ({"image": ""}, {"video": ""}, {"video": "data:,", "pictures": 7}):
        assert client.post(f"{PATH}/inspect", json=wrong).status_code == 422


def test_no_inspector_means_no_route_and_no_page() -> None:
    app = FastAPI()
    app.include_router(router(inspector=False))
    app.state.visual_tokens = _Backend()
    client = TestClient(app)
    assert client.get(PATH).status_code == 200
    assert client.post(f"{PATH}/inspect", json={"image": "data:,"}).status_code == 404
