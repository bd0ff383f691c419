"""What stock vLLM does right: the plugin answers the same without a budget, and obeys one there too."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from PIL import Image

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.server import Server
from promprune_vllm.server.reply_headers import KEPT_HEADER, SEEN_HEADER
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import ask, body, image_url, noise, post, saved
from tests.server.test_bad_images import ODD
from tests.server.test_reply import _same

pytestmark = [pytest.mark.server, pytest.mark.release]
CHAT = "/v1/chat/completions"
KEPT = 20


def answered_as_by_stock(server: Server, stock: Server, request: dict[str, Any]) -> httpx.Response:
    """Send a request to both, from nothing cached, and return our reply: its status and text are stock's."""
    salted = {**request, "cache_salt": salt(request)}
    theirs, ours = (post(each, CHAT, salted) for each in (stock, server))
    assert ours.status_code == theirs.status_code, ours.text
    assert told_by(ours) == told_by(theirs)
    return ours


def salt(request: dict[str, Any]) -> str:
    """A salt of this request's own: both servers compute it from nothing, whatever other tests have left."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def told_by(response: httpx.Response) -> Any:
    """What a reply says, without what differs between any two replies."""
    reply = response.json()
    if response.status_code != 200:
        return reply
    told = (reply["choices"], reply.get("prompt_logprobs"), reply["usage"]["prompt_tokens"])
    return _same(json.dumps({"told": told}))


def pruned(server: Server, request: dict[str, Any], budget: Any = KEPT, kept: int = KEPT) -> dict[str, Any]:
    """Send a request with a budget that its one image must obey, and return the reply."""
    response = post(server, CHAT, {**request, "visual_token_budget": budget})
    assert response.status_code == 200, response.text
    assert (response.headers[SEEN_HEADER], response.headers[KEPT_HEADER]) == (str(VISUAL_TOKENS), str(kept))
    reply: dict[str, Any] = response.json()
    assert reply["usage"]["visual_tokens"]["images"] == [{"seen": VISUAL_TOKENS, "kept": kept}]
    return reply


# The tag of EXIF that says how a picture was turned, and what turns an upright one so that the tag is true.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def upright(width: int = 96, height: int = 64) -> Image.Image:
    with Image.open(photo_path("coffee")) as photo:
        return photo.convert("RGB").resize((width, height))


def turned(orientation: int, image: Image.Image) -> str:
    """A file that is shown as an upright image, because it says how it was turned."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(image.transpose(TURNS[orientation]), "PNG", exif=exif)


# The two long ones take the image processor 10 seconds each: once in the suite is enough.
@pytest.mark.parametrize("name", sorted(ODD.keys() - {"one row", "one column"}))
def test_a_picture_of_any_kind_is_answered_as_by_stock(server: Server, stock: Server, name: str) -> None:
    request = body(ODD[name], return_token_ids=True)
    assert answered_as_by_stock(server, stock, request).status_code == 200
    pruned(server, request)


@pytest.mark.parametrize("orientation", TURNS)
def test_a_turned_photo_is_seen_upright(server: Server, stock: Server, orientation: int) -> None:
    straight = body(saved(upright(), "PNG"), return_token_ids=True, cache_salt="upright")

    def words(reply: dict[str, Any]) -> Any:
        return reply["choices"][0]["token_ids"]

    request = body(turned(orientation, upright()), return_token_ids=True)
    ours = answered_as_by_stock(server, stock, request)
    assert ours.json()["choices"][0]["token_ids"] == ask(server, **straight)["choices"][0]["token_ids"]
    assert (
        pruned(server, request)["choices"][0]["token_ids"] == pruned(server, straight)["choices"][0]["token_ids"]
    )


PNG = base64.b64decode(saved(upright(), "PNG").partition(",")[2])
TEXT = base64.b64encode(PNG).decode()
PADDED = base64.b64encode(PNG + b"x" * (1 - len(PNG) % 3)).decode()
ADDRESSES = {
    "no type": f"data:;base64,{TEXT}",
    "a type of no image": f"data:text/plain;base64,{TEXT}",
    "a parameter": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "upper case of the encoding": f"data:image/png;BASE64,{TEXT}",
    "lines": f"data:image/png;base64,{base64.encodebytes(PNG).decode()}",
    "spaces around": f"  data:image/png;base64,{TEXT} ",
    "no padding": f"data:image/png;base64,{PADDED.rstrip('=')}",
    "percent signs": f"data:image/png;base64,{quote(TEXT, safe='')}",
    "the alphabet of URLs": f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}",
    "no base64": f"data:image/png,{quote(PNG)}",
    "no comma": "data:image/png;base64",
    "a fragment": f"data:image/png;base64,{TEXT}#top",
    "two headers": f"data:image/png;base64,data:image/png;base64,{TEXT}",
    "empty": "",
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_an_odd_address_is_answered_as_by_stock(server: Server, stock: Server, name: str) -> None:
    request = body("coffee", return_token_ids=True)
    request["messages"][0]["content"][0]["image_url"]["url"] = ADDRESSES[name]
    ours = answered_as_by_stock(server, stock, request)
    if ours.status_code == 200:
        pruned(server, request)
    else:
        refused = post(server, CHAT, {**request, "visual_token_budget": KEPT})
        assert (refused.status_code, refused.json()) == (ours.status_code, ours.json())


PARAMETERS = {"type": "object", "properties": {"of": {"enum": ["cup", "cat"]}}, "required": ["of"]}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": PARAMETERS}}
FIELDS: dict[str, dict[str, Any]] = {
    "beam search": {"use_beam_search": True, "n": 2, "max_tokens": 3},
    # No seed: with one, and a prompt of several steps, stock vLLM ends on a CPU (docs/upstream.md).
    "n": {"n": 3, "temperature": 1, "top_k": 1},
    "echo": {"echo": True},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "tools": {"tools": [TOOL], "tool_choice": "none"},
    "a tool by name": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "ignore_eos": False,
        "max_tokens": 20,
    },
    "any tool": {"tools": [TOOL], "tool_choice": "auto"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_way_to_answer_is_stocks(server: Server, stock: Server, name: str) -> None:
    request = body("chelsea", return_token_ids=True, **FIELDS[name])
    ours = answered_as_by_stock(server, stock, request)
    if ours.status_code == 400:
        assert name in ("any tool", "a tool by name"), ours.text  # the operator has named no parser of calls
        return
    full, reply = ours.json(), pruned(server, request)
    assert len(reply["choices"]) == len(full["choices"]) == request.get("n", 1)
    assert full["usage"]["prompt_tokens"] - reply["usage"]["prompt_tokens"] == VISUAL_TOKENS - KEPT
    if name == "prompt_logprobs":
        assert len(reply["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]


ROLES = ("system", "developer", "user", "assistant", "tool")


@pytest.mark.parametrize("role", ROLES)
def test_an_image_in_any_role_is_answered_as_by_stock(server: Server, stock: Server, role: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": image_url("rocket")}}
    turn = {"role": role, "content": [picture, {"type": "text", "text": "This."}]}
    if role == "tool":
        turn["tool_call_id"] = "1"
    request = body("coffee", return_token_ids=True)
    request["messages"].insert(0, turn)
    assert answered_as_by_stock(server, stock, request).status_code == 200
    reply = post(server, CHAT, {**request, "visual_token_budget": [9, 17]}).json()
    assert [image["kept"] for image in reply["usage"]["visual_tokens"]["images"]] == [9, 17]


@pytest.mark.parametrize(
    ("photos", "answer", "budget"),
    [(4, 6, "25%"), (4, None, 490)],
    ids=["the prompt is too long", "as much as there is room for"],
)
def test_the_context_is_as_long_as_stocks_and_has_room_for_what_is_kept(
    server: Server, stock: Server, photos: int, answer: int | None, budget: Any
) -> None:
    request = body(*[noise("four")] * photos, max_tokens=answer)
    if answer:
        refused = answered_as_by_stock(server, stock, request)
        assert refused.status_code == 400
        assert "2048" in refused.json()["error"]["message"]
    reply = post(server, CHAT, {**request, "visual_token_budget": budget})
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    assert usage["completion_tokens"] == (answer or 2048 - usage["prompt_tokens"])
    assert len(usage["visual_tokens"]["images"]) == photos
