"""Values of request fields: those of vLLM's that its document describes too loosely, and our own in every form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from random import Random
from typing import Any

from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from tests.server.fuzz_parts import Body

_THING = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_FUNCTION = {"name": "look", "description": "Look again.", "parameters": _THING}
_NAMED_SCHEMA = {"name": "thing", "schema": _THING}
_TOKENS = ([70], [70, 71, 72], [2], [10**6], [-1])

# Where a value is often refused, that is said by one field of several, as a client would find out.
APT: Mapping[str, Sequence[Any]] = {
    "logprobs": (True, False, True),
    "top_logprobs": (0, 1, 5, 20, 21),
    "prompt_logprobs": (0, 1, 5),
    "logprob_token_ids": ([70, 71], [70]),
    "n": (1, 2, 2, 0),
    "best_of": (1, 2),
    "use_beam_search": (True, False),
    "length_penalty": (0.5, 1.0),
    "temperature": (0, 0.7, 2, -1),
    "top_p": (0.1, 1, 0),
    "top_k": (-1, 1, 5),
    "min_p": (0, 0.5),
    "repetition_penalty": (1.1, 0.5),
    "frequency_penalty": (0.5, -2, 3),
    "presence_penalty": (0.5, 2),
    "seed": (0, 7, -1),
    "stop": ("a", ["b", "zz"], [], [""]),
    "stop_token_ids": _TOKENS,
    "stop_sequences": (["a"], []),
    "include_stop_str_in_output": (True,),
    "min_tokens": (0, 1, 9),
    "ignore_eos": (True, False),
    "logit_bias": ({"70": 5}, {"99": -100, "70": 1}, {"400": 1}, {"x": 1}),
    "allowed_token_ids": _TOKENS,
    "bad_words": (["a"], ["the", "b"], [""]),
    "echo": (True, False),
    "suffix": (None, "end"),
    "truncate_prompt_tokens": (-1, 1, 8, 600, 100_000),
    "truncation_side": ("left", "right"),
    "stream": (True, True, False),
    "stream_options": ({"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}),
    "stream_interval": (1, 2),
    "response_format": (
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": _NAMED_SCHEMA},
        {"type": "json_schema"},
    ),
    "structured_outputs": (
        {"regex": "[ab]{2}"},
        {"choice": ["yes", "no"]},
        {"json": _THING},
        {"json_object": True},
        {"grammar": 'root ::= "a" | "b"'},
        {"regex": "["},
        {"choice": []},
        {"regex": "a", "choice": ["a"]},
    ),
    "tools": ([{"type": "function", "function": _FUNCTION}], []),
    "tool_choice": ("none", "auto", "required", {"type": "function", "function": {"name": "look"}}),
    "parallel_tool_calls": (True, False),
    "priority": (0, 1, -5),
    "request_id": ("fuzzed", ""),
    "session_id": ("fuzzed", None),
    "cache_salt": ("salt", ""),
    "documents": ([{"title": "A", "text": "B"}], []),
    "chat_template": (None, "{{ messages }}"),
    "chat_template_kwargs": ({"enable_thinking": False}, {}, {"chat_template": "x"}),
    "mm_processor_kwargs": (None, {}, {"min_pixels": 784}),
    "media_io_kwargs": (None, {}, {"image": {"rgba_background_color": [0, 0, 0]}}),
    "add_generation_prompt": (True, False),
    "continue_final_message": (True, False),
    "add_special_tokens": (True, False),
    "return_token_ids": (True, False),
    "return_tokens_as_token_ids": (True, False),
    "return_token_offsets": (True,),
    "return_token_strs": (True,),
    "return_prompt_text": (True,),
    "return_mm_kwargs": (True, False),
    "mm_payload": ("tensors", "none"),
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (False,),
    "reasoning_effort": ("low", "none"),
    "include_reasoning": (True, False),
    "thinking_token_budget": (1, 0),
    "kv_transfer_params": ({}, {"do_remote_decode": True}),
    "ec_transfer_params": ({}, {"a": 1}),
    "vllm_xargs": ({"mine": 1}, {}),
    "repetition_detection": ({"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 2}, {}),
    "user": ("somebody",),
    "instructions": ("Be short.", ""),
    "text": (
        {"format": {"type": "text"}},
        {"format": {"type": "json_object"}},
        {"format": {"type": "json_schema", **_NAMED_SCHEMA}},
    ),
    "store": (True, False),
    "background": (True, False),
    "include": (["message.output_text.logprobs"], []),
    "truncation": ("auto", "disabled"),
    "reasoning": ({"effort": "low"}, None),
    "metadata": ({"a": "b"}, None),
    "previous_response_id": (None, "resp_nothing"),
    "enable_response_messages": (True,),
    "system": ("Be short.", [{"type": "text", "text": "Be short."}]),
    "thinking": ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}),
    "output_config": ({"effort": "low"}, {"format": {"type": "json_schema", "schema": _THING}}),
    "apply_softmax": (True, False),
    "item_first": (True, False),
    "output_mode": ("tokens", "text"),
    "detail": ("low", "high", "auto"),
}
_CLAUDE = {
    "tools": ([{"name": "look", "input_schema": _THING}], []),
    "tool_choice": ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "look"}, {"type": "none"}),
}
_RESPONSES = {
    "tools": ([{"type": "function", "name": "look", "parameters": _THING, "strict": False}], []),
    "tool_choice": ("none", "auto", "required", {"type": "function", "name": "look"}),
}
_ELSEWHERE: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "/v1/messages": _CLAUDE,
    "/v1/messages/count_tokens": _CLAUDE,
    "/v1/messages/render": _CLAUDE,
    "/v1/responses": _RESPONSES,
    "/v1/responses/render": _RESPONSES,
    "/v1/completions": {"logprobs": (0, 1, 5, 20)},
    "/v1/completions/render": {"logprobs": (0, 1, 5)},
    "/v1/visual_tokens/count": {"detail": (["low", "high"], ["auto"])},
    "/v1/visual_tokens/inspect": {"text": ("a cup", "", None)},
}
# Fields of sampling that the token route has one level down.
_SAMPLING = {
    **{"logprobs": (0, 1, 5, 20), "prompt_logprobs": (0, 1), "n": (1, 2), "detokenize": (True, False)},
    **{
        name: APT[name]
        for name in ("stop", "stop_token_ids", "seed", "top_p", "top_k", "min_tokens", "logit_bias")
    },
    **{name: APT[name] for name in ("allowed_token_ids", "bad_words", "structured_outputs", "temperature")},
    **{"extra_args": ({}, {FIELD: 8}), "skip_clone": (True,), "output_kind": (0, 1, 2)},
}


def add_apt(draw: Random, path: str, known: Sequence[str], body: Body) -> None:
    """Set one to four fields that a route has to values that make sense, or nearly so."""
    values = {**APT, **_ELSEWHERE.get(path, {})}
    for name in draw.sample(known, min(len(known), draw.randint(1, 4))):
        if name in values:
            body[name] = deepcopy(draw.choice(values[name]))
    if "stream_options" in body:
        body["stream"] = True
    if "top_logprobs" in body and "logprobs" in known:
        body["logprobs"] = True
    if "tool_choice" in body and "tools" in known:
        body["tools"] = deepcopy(values["tools"][0])
    if "sampling_params" in body:
        for name in draw.sample(sorted(_SAMPLING), draw.randint(0, 2)):
            body["sampling_params"][name] = deepcopy(draw.choice(_SAMPLING[name]))


_MOST = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "n": 2, "best_of": 2}
_ALLOWED = 20_000


def tame(body: Body) -> None:
    """Take back what vLLM itself does not bear.

    Lengths, and up to 16,384 answers to a request, are taken and worked on for minutes: they are lowered. More
    than it takes stays, and is refused at once.

    A seed, where tokens are drawn, ends stock vLLM on a CPU as soon as a prompt is read in several steps
    ("CPU Generator does not use offset"): it goes with temperature 0 alone.
    """
    for where in (body, body.get("sampling_params")):
        if not isinstance(where, dict):
            continue
        for name, most in _MOST.items():
            if isinstance(where.get(name), int | float) and most < where[name] <= _ALLOWED:
                where[name] = most
        if where.get("temperature") != 0:
            where.pop("seed", None)


_GOOD: tuple[Any, ...] = (1, 3, 8, 8, 16, 5000, 0.25, 0.5, "25%", "100%", "full", "auto", {"total": 8}, None)
_BAD: tuple[Any, ...] = (
    *(0, -1, 64.5, 1e300, True, "", "many", "0%", "101%", [], [[]], {}, {"total": 0}, {"total": "8"}),
    *({"total": 8, "each": 1}, [None], [0], 10**30, "\x00", {"visual_token_budget": 8}, [8] * 2000),
    *({"per_frame": 0}, {"per_frame": 8, "total": 8}, [{"total": 8}]),
)
_EITHER: tuple[Any, ...] = (
    *([8], [8, "full"], [0.5, 3, 3], {"total": 1}, "8", 8.0),
    *({"per_frame": 8}, {"per_frame": "8"}, [{"per_frame": 8}], ["auto", {"per_frame": 3}]),
)
_METHODS: tuple[Any, ...] = ("promprune", "promprune", None, "random", "nope", 7, ["promprune"])
_MISSES = (
    *("visual_tokens_budget", "visual_token_budgets", "visualTokenBudget", "visual-token-budget"),
    *("visual_token_metod", "visual_token", "Visual_Token_Budget"),
)


def ask_for_pruning(draw: Random, path: str, body: Body) -> tuple[Body, bool]:
    """Return a body with our fields somewhere, and whether what they say must be found right."""
    body = deepcopy(body)
    kind = draw.choices((_GOOD, _EITHER, _BAD), (18, 3, 2))[0]
    budget = deepcopy(draw.choice(kind))
    right = kind is _GOOD and not isinstance(budget, dict)
    form = draw.random()
    if path == "/invocations" and isinstance(budget, dict):
        # vLLM's schemas have no object in vllm_xargs, and this route then takes the body for another request.
        form = 0.0
    xargs = body.get("vllm_xargs")
    if form < 0.74:
        body[FIELD] = budget
    elif form < 0.92:
        body["vllm_xargs"] = {**(xargs if isinstance(xargs, dict) else {}), FIELD: budget}
        right = right and budget is not None
    elif form < 0.94:
        body[FIELD] = budget
        body["vllm_xargs"] = {FIELD: draw.choice((budget, 8))}
        right = False
    else:
        right = False
        _misplace(draw, body, budget)
    if draw.random() < 0.2:
        body[METHOD_FIELD] = method = draw.choice(_METHODS)
        right = right and method in ("promprune", None)
    return body, right


def _misplace(draw: Random, body: Body, budget: Any) -> None:
    form = draw.randrange(5)
    if form == 0:
        body["extra_body"] = {FIELD: budget}
    elif form == 1:
        body["mm_processor_kwargs"] = {FIELD: budget}
    elif form == 2:
        body["media_io_kwargs"] = {"image": {FIELD: budget}}
    elif form == 3 and isinstance(body.get("messages"), list):
        for turn in body["messages"]:
            content = turn.get("content") if isinstance(turn, dict) else None
            for part in content if isinstance(content, list) else ():
                part[FIELD] = budget
    else:
        body[draw.choice(_MISSES)] = budget
