"""A misspelled or misplaced field of ours is refused with what was meant; other names are none of our business."""

from __future__ import annotations

from typing import Any

import pytest

from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.errors import BudgetError
from promprune_vllm.server.near_misses import CONTENT, MEDIA_TYPES, WRAPPERS, check, closest_field

URL = {"url": "data:image/png;base64,AAAA"}
MISSPELLED = {
    "visual_tokens_budget": FIELD,
    "visual_token_budgets": FIELD,
    "visualTokenBudget": FIELD,
    "VISUAL_TOKEN_BUDGET": FIELD,
    "visual-token-budget": FIELD,
    "vision_token_budget": FIELD,
    "visual_token_limit": FIELD,
    "visual_token_detail": FIELD,
    "visual_token_methods": METHOD_FIELD,
    "visualTokenMethod": METHOD_FIELD,
}
# Names of vLLM's own, of OpenAI's, and of nobody's.
OTHERS = (
    *("thinking_token_budget", "max_completion_tokens", "token_budget", "method", "metadata", "budget_tokens"),
    *("visual_tokens", "priority", "x" * 5000, "", "bild"),
)


@pytest.mark.parametrize(("name", "meant"), MISSPELLED.items())
def test_a_misspelled_field_is_refused_with_what_was_meant(name: str, meant: str) -> None:
    for body in ({name: 64}, {"vllm_xargs": {name: 64}}):
        with pytest.raises(BudgetError, match=f"Did you mean '{meant}'") as refused:
            check(body)
        assert (refused.value.param, refused.value.reason) == (name, "field")


@pytest.mark.parametrize("name", OTHERS, ids=lambda name: name[:24])
def test_other_names_are_left_alone(name: str) -> None:
    assert closest_field(name) is None
    check({name: 1, "vllm_xargs": {name: 1}, "extra_body": {name: 1}})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_field_inside_an_object_that_nobody_unpacks_is_refused(wrapper: str) -> None:
    for name in (FIELD, METHOD_FIELD, "visual_tokens_budget"):
        with pytest.raises(BudgetError, match="at the top level of the request"):
            check({wrapper: {name: 64}})


@pytest.mark.parametrize("container", CONTENT)
@pytest.mark.parametrize("kind", MEDIA_TYPES)
def test_a_field_inside_an_image_or_video_part_is_refused(container: str, kind: str) -> None:
    parts: list[dict[str, Any]] = [
        {"type": kind, "image_url": URL, FIELD: 64},
        {"type": kind, "image_url": {**URL, FIELD: 64}},
        {"image_url": URL, FIELD: 64},
        {"video_url": URL, FIELD: 64},
    ]
    for part in parts:
        for content in (
            [part],
            [{"role": "user", "content": [part]}],
            [[{"content": [part]}]],
            {"content": [part]},
        ):
            with pytest.raises(BudgetError, match="For a budget per image or video, send a list"):
                check({container: content})


@pytest.mark.parametrize("name", [FIELD, METHOD_FIELD])
@pytest.mark.parametrize("value", [None, {"total": 8}, {"per_frame": 8}, [None], [[8]], ["full", {}]], ids=str)
def test_what_vllm_does_not_read_in_xargs_is_refused_with_a_word_on_why(name: str, value: object) -> None:
    with pytest.raises(BudgetError, match=f"{name} in 'vllm_xargs' must be a number") as refused:
        check({"vllm_xargs": {name: value}})
    assert refused.value.param == name
    check({name: value, "vllm_xargs": {name: 8, "other": value}})


def test_what_tools_and_texts_are_called_is_left_alone() -> None:
    call = {"type": "tool_use", "name": "serve", "input": {FIELD: 64}}
    tool = {"type": "function", "function": {"parameters": {"properties": {FIELD: {}}}}}
    text = {"type": "text", "text": FIELD, "note": {FIELD: 64}}
    check(
        {"messages": [{"role": "assistant", "content": [call, text]}], "tools": [tool], "metadata": {FIELD: "64"}}
    )


@pytest.mark.parametrize("value", [None, 3, "x", [], [[[[[[[[[[{}]]]]]]]]]], {"content": None}, [1, {"type": []}]])
def test_any_json_may_come(value: object) -> None:
    check(dict.fromkeys((*CONTENT, *WRAPPERS, "vllm_xargs", FIELD, METHOD_FIELD), value))
