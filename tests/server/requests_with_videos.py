"""Requests with images and videos for a server of Qwen2.5-VL, and what must be said of them."""

from __future__ import annotations

from typing import Any

from promprune_vllm.demo.server import Server, is_healthy
from tests.clips import Clip
from tests.server.conftest import MODEL, image_url, post
from tests.server.test_reply import headers

CHAT, GENERATE = "/v1/chat/completions", "/inference/v1/generate"
BUDGET, ESCALATE = "visual_token_budget", "visual_token_escalate"
PHOTO = 247
"""Tokens of the photograph. A frame has 15, and Qwen2.5-VL's tower merges two frames into one."""
CLIP = Clip(7)
URLS = {"mp4": (CLIP.mp4_url(), 3), "frames": (CLIP.frames_url(), 4)}
"""URLs of the clip, and the frames that the tower makes of it: of 6 sampled ones, or of 7 and the last again."""
TEXT = {"type": "text", "text": "What?"}
BUDGETS: list[tuple[Any, dict[str, tuple[int, int, int]]]] = [
    (7, {"mp4": (7, 7, 7), "frames": (7, 7, 7)}),
    ("20%", {"mp4": (50, 9, 50), "frames": (50, 12, 50)}),
    ("full", {"mp4": (PHOTO, 45, PHOTO), "frames": (PHOTO, 60, PHOTO)}),
    ("auto", {"mp4": (PHOTO, 45, PHOTO), "frames": (PHOTO, 60, PHOTO)}),
    ({"per_frame": 2}, {"mp4": (PHOTO, 6, PHOTO), "frames": (PHOTO, 8, PHOTO)}),
    ({"total": 60}, {"mp4": (27, 6, 27), "frames": (27, 7, 26)}),
    (["full", 9, "25%"], {"mp4": (PHOTO, 9, 62), "frames": (PHOTO, 9, 62)}),
    ([5, {"per_frame": 3}, "auto"], {"mp4": (5, 9, PHOTO), "frames": (5, 12, PHOTO)}),
]
"""Budget, and what the photograph, the clip and the photograph again keep of it."""


def photo(url: str | None = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url or image_url("coffee")}}


def video(url: str = URLS["mp4"][0], **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **more}


def asked(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": [*parts, TEXT]}]
    return {"model": MODEL, "messages": messages, "max_tokens": 2, "temperature": 0, "ignore_eos": True, **fields}


def told(*media: tuple[str, int, int]) -> dict[str, Any]:
    """``usage.visual_tokens`` of images and videos: kind, tokens before and tokens after of each."""
    usage: dict[str, Any] = {"seen": sum(seen for _, seen, _ in media), "kept": sum(kept for *_, kept in media)}
    for name in ("images", "videos"):
        usage[name] = [{"seen": seen, "kept": kept} for kind, seen, kept in media if f"{kind}s" == name]
    return usage


def answered(server: Server, *parts: dict[str, Any], path: str = CHAT, **fields: Any) -> dict[str, Any]:
    response = post(server, path, asked(*parts, **fields))
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = response.json()["usage"]
    counts = usage["visual_tokens"]
    assert headers(response) == (str(counts["seen"]), str(counts["kept"]))
    return usage


def refused(server: Server, path: str, request: dict[str, Any], message: str) -> dict[str, Any]:
    """Return the error of a request that is refused with this message; the server answers afterwards."""
    response = post(server, path, request)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert message in error["message"]
    assert is_healthy(server.url)
    return error


REFUSED: list[tuple[Any, tuple[dict[str, Any], ...], str]] = [
    ([4], (photo(), video()), "has 1 entries, but the prompt has 1 image(s) and 1 video(s)"),
    ([4, 5, 6], (video(),), "has 3 entries, but the prompt has 0 image(s) and 1 video(s)"),
    ([{"per_frame": 2}, 5], (photo(), video()), "[0] is {'per_frame': 2}, but an image has no frames"),
    ({"per_frame": 2}, (photo(),), "the prompt has 1 image(s) and no video"),
    ({"per_frame": 0}, (video(),), 'from 1 to 1000000 tokens in "per_frame"'),
    ({"per_frame": 2, "total": 9}, (video(),), '{"per_frame": tokens} if it is an object'),
    ({"total": 1}, (photo(), video()), "Send a total of 2 or more"),
    (5, ({**video(), BUDGET: 5},), "inside 'messages' would be ignored"),
    (
        5,
        ({"type": "video_url", "video_url": {"url": URLS["mp4"][0], BUDGET: 5}},),
        "For a budget per image or video",
    ),
]
"""Budget, images and videos that it does not fit, and the message."""
