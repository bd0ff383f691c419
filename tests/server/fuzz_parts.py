"""What a fuzzed request is about: images in every form, conversations, and the parts each route cannot do without.

The server's document says of these only that they are objects or strings, so they are written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from random import Random
from typing import Any

from PIL import Image

from promprune_vllm.core.budget import FIELD
from promprune_vllm.demo import photo_path
from promprune_vllm.demo.server import Server
from tests.server.conftest import MODEL, post, saved

Body = dict[str, Any]
CHAT = "/v1/chat/completions"
SIZES = ((96, 64), (64, 96), (56, 56), (140, 84))
TEXTS = ("What is in the picture?", "Name the colours.", "", "ä€😀", "<image>", "<|image_pad|>")
NAMED = "fuzz-image"
"""An image with this name is sent to every server first, so that a request may leave its data out."""


@cache
def photograph(size: tuple[int, int], kind: str = "JPEG") -> str:
    """A photograph of a few kilobytes as a data URL."""
    with Image.open(photo_path("coffee")) as photo:
        return saved(photo.convert("RGB").resize(size), kind)


def _bad(draw: Random) -> Any:
    """What is no picture, or one that cannot be had, or one of an odd shape."""
    good = photograph(SIZES[0])
    return draw.choice(
        [
            *(
                "",
                "data:,",
                "data:image/png;base64,",
                "data:image/png;base64,AAAA",
                "not a URL",
                "file:///etc/passwd",
            ),
            *(good[: len(good) // 2], good[:-40], "data:text/plain;base64,SGVsbG8=", photograph((1, 1))),
            *(photograph((600, 2)), photograph((3, 3), "PNG"), photograph((2, 500), "PNG")),
            *(None, 7, [], {"url": good}),
        ]
    )


def address(draw: Random) -> Any:
    """Where an image is: most often a good data URL."""
    if draw.random() < 0.08:
        return _bad(draw)
    return photograph(draw.choice(SIZES), draw.choice(("JPEG", "PNG")))


def _image_part(draw: Random) -> Body:
    """An image of a chat."""
    image: Any = {"url": address(draw)}
    if draw.random() < 0.15:
        image["detail"] = draw.choice(("low", "high", "auto", "lowest"))
    part: Body = {"type": "image_url", "image_url": image}
    form = draw.random()
    if form < 0.05:
        part["image_url"] = image["url"]
    elif form < 0.10:
        del part["type"]
    elif form < 0.25:
        part |= {"uuid": NAMED, "image_url": {"url": photograph(SIZES[0])}}
    elif form < 0.35:
        part |= {"uuid": NAMED, "image_url": None}
    elif form < 0.37:
        part |= {"uuid": draw.choice(("never sent", "", 5)), "image_url": None}
    return part


def _count(draw: Random) -> int:
    return draw.choices((0, 1, 2, 3), (2, 8, 3, 1))[0]


def messages(draw: Random) -> list[Body]:
    """A chat of one turn most often, with up to three images."""
    parts: list[Body] = [_image_part(draw) for _ in range(_count(draw))]
    parts.insert(draw.randint(0, len(parts)), {"type": "text", "text": draw.choice(TEXTS)})
    turns: list[Body] = [{"role": "user", "content": parts}]
    form = draw.random()
    if form < 0.08:
        turns.insert(0, {"role": "system", "content": "Be short."})
    elif form < 0.16:
        said = {"role": "assistant", "content": "A cup."}
        turns += [said, {"role": "user", "content": "Sure?"}] if draw.random() < 0.5 else [said]
    elif form < 0.20:
        turns[0]["role"] = draw.choice(("system", "developer", "assistant", "tool", "someone"))
    elif form < 0.24:
        turns[0]["content"] = draw.choice((None, "", "What?", [], [{"type": "text"}], [{"type": "picture"}], 7))
    elif form < 0.26:
        turns = []
    return turns


def _claude_part(draw: Random) -> Body:
    url = address(draw)
    source: Any = {"type": "url", "url": url}
    if isinstance(url, str) and url.startswith("data:") and ";base64," in url and draw.random() < 0.8:
        media, _, data = url.removeprefix("data:").partition(";base64,")
        source = {"type": "base64", "media_type": media, "data": data}
    return {"type": "image", "source": source}


def _claude(draw: Random) -> Body:
    parts = [*(_claude_part(draw) for _ in range(_count(draw))), {"type": "text", "text": draw.choice(TEXTS)}]
    turns: list[Body] = [{"role": "user", "content": parts if draw.random() < 0.9 else "What?"}]
    if draw.random() < 0.1:
        result = {"type": "tool_result", "tool_use_id": "t1", "content": [_claude_part(draw)]}
        used = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
        turns += [{"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
    return {"messages": turns}


def _chat(draw: Random) -> Body:
    return {"messages": messages(draw)}


def _batch(draw: Random) -> Body:
    return {"messages": [messages(draw) for _ in range(draw.choices((1, 2, 0), (5, 4, 1))[0])]}


def _completion(draw: Random) -> Body:
    prompts = ("Say something.", "<image> What?", [70, 71, 72], ["a", "b"], [[70, 71], [72]], "", [3, 3, 70])
    return {"prompt": draw.choice(prompts)}


def _response(draw: Random) -> Body:
    if draw.random() < 0.15:
        return {"input": draw.choice(("Say something.", "", []))}
    parts: list[Body] = []
    for _ in range(_count(draw)):
        url = address(draw)
        parts.append({"type": "input_image", "image_url": url, "detail": draw.choice(("auto", "low", "high"))})
    parts.append({"type": "input_text", "text": draw.choice(TEXTS)})
    return {"input": [{"role": draw.choice(("user", "user", "user", "system")), "content": parts}]}


def _tokenize(draw: Random) -> Body:
    return _chat(draw) if draw.random() < 0.7 else {"prompt": draw.choice(("Say.", "", "<image>"))}


def _generate(draw: Random) -> Body:
    body: Body = {"token_ids": draw.choice(([70, 71, 72], [1, 70, 3, 80], [3], [3, 3, 70], [10**9], [320]))}
    if draw.random() < 0.6:
        parts = [_image_part(draw) for _ in range(_count(draw))]
        body["token_ids"] = [1, *([3] * len(parts)), 70, 71]
        body["content_parts"] = parts
    return body


def _decision(draw: Random) -> Body:
    question = draw.choice(
        (
            {"type": "yes_no", "instructions": "Is it a cup?"},
            {"type": "bool", "instructions": "Is it a cup?"},
            {"type": "choice", "criteria": ["a", "b"]},
            {"type": "nothing"},
        )
    )
    body: Body = {"state": draw.choice(("A picture.", {"a": 1}, None)), "questions": {"q": question}}
    if draw.random() < 0.8:
        body["images"] = [address(draw) for _ in range(_count(draw))]
    return body


def _scored(draw: Random) -> Body:
    items = draw.choice((["yes", "no"], [[70], [71]], []))
    return {"query": draw.choice(("Is it?", [70, 71])), "items": items, "label_token_ids": [70, 71]}


def _detokenized(draw: Random) -> Body:
    return {"tokens": draw.choice(([70, 71], [], [319], [320], [2**40]))}


def _inspected(draw: Random) -> Body:
    return {"image": address(draw)}


def _sized(draw: Random) -> Body:
    return {"images": [{"width": width, "height": height} for width, height in draw.choices(SIZES, k=2)]}


def _any(draw: Random) -> Body:
    return draw.choice((_chat, _chat, _completion, _response, _scored))(draw)


Base = Callable[[Random], Body]
BASES: Mapping[str, tuple[int, Base]] = {
    "/v1/chat/completions": (24, _chat),
    "/v1/chat/completions/batch": (8, _batch),
    "/v1/completions": (8, _completion),
    "/v1/responses": (14, _response),
    "/v1/messages": (12, _claude),
    "/v1/messages/count_tokens": (4, _claude),
    "/tokenize": (6, _tokenize),
    "/detokenize": (1, _detokenized),
    "/invocations": (6, _any),
    "/generative_scoring": (2, _scored),
    "/v1/systemone": (1, _decision),
    "/inference/v1/generate": (10, _generate),
    "/v1/chat/completions/render": (5, _chat),
    "/v1/completions/render": (2, _completion),
    "/v1/messages/render": (3, _claude),
    "/v1/responses/render": (3, _response),
    "/v1/chat/completions/derender": (1, lambda _: {}),
    "/v1/completions/derender": (1, lambda _: {}),
    "/v1/visual_tokens/count": (2, _sized),
    "/v1/visual_tokens/inspect": (3, _inspected),
}
"""By route: how often it is drawn, and what makes the parts that its request needs."""

LEFT_OUT: Mapping[str, str] = {
    "/ping": "takes no body",
    "/scale_elastic_ep": "changes the server, for everyone: the operator's",
    "/is_scaling_elastic_ep": "takes no body",
    "/v1/responses/{response_id}/cancel": "takes no body",
    "/inference/v1/abort_requests": "ends requests of others: the operator's",
}
"""Routes of the document that are not drawn, each with its reason. A test fails on one in neither table."""


_SILENT = {"/tokenize", "/detokenize", "/v1/systemone", "/generative_scoring", "/v1/messages/count_tokens"}
_SILENT |= {"/v1/visual_tokens/count", "/v1/visual_tokens/inspect"}


def base(path: str, draw: Random) -> Body:
    """What a request to a route needs, and a length of a few tokens where it generates."""
    body = BASES[path][1](draw)
    body["model"] = MODEL if draw.random() < 0.98 else draw.choice(("nope", None, 7))
    length = draw.randint(1, 4)
    if path == "/v1/responses":
        body["max_output_tokens"] = length
    elif path == "/inference/v1/generate":
        body["sampling_params"] = {"max_tokens": length, "temperature": 0}
    elif path not in _SILENT:
        body["max_tokens"] = length
    if path.startswith("/v1/visual_tokens"):
        del body["model"]
    elif path not in _SILENT:
        body["temperature"] = 0  # so that both servers come to the same tokens
    return body


def named_first(server: Server) -> None:
    """Send the image that others only name."""
    part = {"type": "image_url", "uuid": NAMED, "image_url": {"url": photograph(SIZES[0])}}
    sent = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": [part]}]}
    assert post(server, CHAT, sent).status_code == 200


def rendered(ours: Server, stock: Server) -> list[tuple[Body, Body]]:
    """Return requests of tokens as stock renders them, and as ours does with a budget; none without the route."""
    found = []
    for i, budget in enumerate((1, 3, 8, "full")):
        image = {"type": "image_url", "image_url": {"url": photograph(SIZES[i])}}
        content = [*[image] * (1 + i % 2), {"type": "text", "text": "What?"}]
        chat = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        asked = {**chat, FIELD: budget}
        answers = [post(each, f"{CHAT}/render", body) for each, body in ((stock, chat), (ours, asked))]
        if all(answer.status_code == 200 for answer in answers):
            found.append((answers[0].json(), answers[1].json()))
    return found
