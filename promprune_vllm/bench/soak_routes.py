"""How a soak reads each route's replies, whole or streamed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """The parts of a reply that are compared.

    Args:
        texts: Text of each choice; the arguments if it is a tool call.
        prompt_tokens: Prompt tokens after pruning.
        seen: Visual tokens before pruning.
        kept: Visual tokens that entered the language model.
        logprobs: Number of tokens with log-probabilities.
    """

    texts: tuple[str, ...]
    prompt_tokens: int
    seen: int
    kept: int
    logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """How one route is read.

    Args:
        read: Reads a whole reply.
        read_stream: Reads the events of a stream.
        stream_fields: Request fields that ask for a stream with its usage.
    """

    read: Callable[[Event], Reply]
    read_stream: Callable[[Sequence[Event]], Reply]
    stream_fields: Mapping[str, Any]


def _reply(texts: Sequence[str], usage: Event | None, name: str, logprobs: int = 0) -> Reply:
    if not usage:
        raise ValueError("a reply without usage")
    counted = usage.get("visual_tokens") or {"seen": 0, "kept": 0}
    return Reply(tuple(texts), usage[name], counted["seen"], counted["kept"], logprobs)


def _text_of(message: Event) -> str:
    """Return the text and tool arguments of a message or a delta."""
    calls = message.get("tool_calls") or ()
    return (message.get("content") or "") + "".join(call["function"].get("arguments") or "" for call in calls)


def _logprob_count(choice: Event) -> int:
    return len((choice.get("logprobs") or {}).get("content") or ())


def _chat(body: Event) -> Reply:
    texts = [_text_of(choice["message"]) for choice in body["choices"]]
    return _reply(texts, body["usage"], "prompt_tokens", sum(map(_logprob_count, body["choices"])))


def _chat_stream(events: Sequence[Event]) -> Reply:
    texts: dict[int, str] = defaultdict(str)
    logprobs, usage = 0, None
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += _text_of(choice["delta"])
            logprobs += _logprob_count(choice)
        usage = event.get("usage") or usage
    return _reply([texts[index] for index in sorted(texts)], usage, "prompt_tokens", logprobs)


def _completion(body: Event) -> Reply:
    logprobs = sum(len((choice.get("logprobs") or {}).get("tokens") or ()) for choice in body["choices"])
    return _reply([choice["text"] for choice in body["choices"]], body["usage"], "prompt_tokens", logprobs)


def _completion_stream(events: Sequence[Event]) -> Reply:
    texts: dict[int, str] = defaultdict(str)
    logprobs, usage = 0, None
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            logprobs += len((choice.get("logprobs") or {}).get("tokens") or ())
        usage = event.get("usage") or usage
    return _reply([texts[index] for index in sorted(texts)], usage, "prompt_tokens", logprobs)


def _response(body: Event) -> Reply:
    texts = []
    for item in body["output"]:
        parts = item.get("content") or ()
        texts.append("".join(part.get("text") or "" for part in parts) + (item.get("arguments") or ""))
    return _reply(texts, body["usage"], "input_tokens")


def _response_stream(events: Sequence[Event]) -> Reply:
    """Read the last event, which has the whole answer; the earlier deltas must add up to the same text."""
    pieces = "".join(each["delta"] for each in events if each["type"] == "response.output_text.delta")
    reply = _response(events[-1]["response"])
    if "".join(reply.texts) != pieces:
        raise ValueError(f"a stream ended with {reply.texts}, but its deltas were {pieces!r}")
    return reply


def _message(body: Event) -> Reply:
    texts = [part.get("text") or json.dumps(part.get("input")) for part in body["content"]]
    return _reply(["".join(texts)], body["usage"], "input_tokens")


def _message_stream(events: Sequence[Event]) -> Reply:
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
    usage = next((each["usage"] for each in reversed(events) if each.get("usage")), None)
    return _reply(["".join(delta.get("text") or "" for delta in deltas)], usage, "input_tokens")


_WITH_USAGE = MappingProxyType({"stream": True, "stream_options": {"include_usage": True}})
_PLAIN = MappingProxyType({"stream": True})
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
ROUTES: Mapping[str, Route] = MappingProxyType(
    {
        CHAT: Route(_chat, _chat_stream, _WITH_USAGE),
        COMPLETIONS: Route(_completion, _completion_stream, _WITH_USAGE),
        RESPONSES: Route(_response, _response_stream, _PLAIN),
        MESSAGES: Route(_message, _message_stream, _PLAIN),
    }
)
