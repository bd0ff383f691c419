"""What a reply tells, with an app of three lines in the server's place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from promprune_vllm.core.budget import IMAGE, VIDEO
from promprune_vllm.server.reply_headers import VisualTokenHeaders
from promprune_vllm.server.usage import current_usage, record_images, recording


async def _reply(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"x"})


def _call(handle: Callable[[], Any], *, kind: str = "http") -> list[dict[str, Any]]:
    """Send one request through the middleware and return the messages of its reply."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await handle()
        await _reply(send)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(VisualTokenHeaders(app)({"type": kind}, None, send))  # type: ignore[arg-type]
    return sent


def test_a_reply_to_images_has_their_counts_in_its_headers() -> None:
    async def handle() -> None:
        # vLLM handles a request in a task of its own, which has a copy of the context.
        await asyncio.create_task(_record([(576, 64), (576, 576)]))

    start, end = _call(handle)
    assert start["headers"] == [
        (b"a", b"b"),
        (b"x-visual-tokens-seen", b"1152"),
        (b"x-visual-tokens-kept", b"640"),
    ]
    assert end == {"type": "http.response.body", "body": b"x"}


async def _record(images: list[tuple[int, int]]) -> None:
    record_images(images)


def test_several_prompts_add_up() -> None:
    usages: list[Any] = []

    async def handle() -> None:
        await _record([(10, 4)])
        await _record([])
        await _record([(20, 20)])
        current = current_usage()
        assert current is not None
        usages.append(current.usage())

    _call(handle)
    images = [{"seen": 10, "kept": 4}, {"seen": 20, "kept": 20}]
    assert usages == [{"seen": 30, "kept": 24, "images": images}]


def test_videos_have_a_list_of_their_own_and_count_in_the_sums() -> None:
    with recording() as usage:
        record_images([(576, 64)])
        record_images([(2000, 320), (100, 100), (48, 8)], kinds=[VIDEO, IMAGE, VIDEO])
    assert usage.usage() == {
        "seen": 2724,
        "kept": 492,
        "images": [{"seen": 576, "kept": 64}, {"seen": 100, "kept": 100}],
        "videos": [{"seen": 2000, "kept": 320}, {"seen": 48, "kept": 8}],
    }


def test_a_second_try_replaces_what_the_first_one_recorded() -> None:
    with recording() as usage:
        record_images([(10, 10)])
        place = record_images([(2000, 320), (576, 64)], kinds=[VIDEO, IMAGE])
        record_images([(20, 20)])
        record_images([(2000, 2000), (576, 576)], at=place, kinds=[VIDEO, IMAGE])
    assert usage.usage() == {
        "seen": 2606,
        "kept": 2606,
        "images": [{"seen": each, "kept": each} for each in (10, 576, 20)],
        "videos": [{"seen": 2000, "kept": 2000}],
    }


def test_the_headers_count_images_and_videos() -> None:
    async def handle() -> None:
        record_images([(2000, 320), (576, 64)], kinds=[VIDEO, IMAGE])

    start, _ = _call(handle)
    assert start["headers"][1:] == [(b"x-visual-tokens-seen", b"2576"), (b"x-visual-tokens-kept", b"384")]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_without_images_a_reply_is_left_alone(kind: str) -> None:
    async def handle() -> None:
        record_images([])
        assert current_usage() is None

    start, _ = _call(handle, kind=kind)
    assert start["headers"] == [(b"a", b"b")]


def test_requests_at_the_same_time_do_not_mix() -> None:
    sent: dict[int, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(3):
            record_images([(100, scope["kept"])])
            await asyncio.sleep(0)
        await _reply(send)

    async def one(kept: int) -> None:
        async def send(message: Any) -> None:
            sent.setdefault(kept, dict(message.get("headers", ())))

        await VisualTokenHeaders(app)({"type": "http", "kept": kept}, None, send)  # type: ignore[arg-type]

    async def many() -> None:
        await asyncio.gather(*(one(kept) for kept in range(1, 20)))

    asyncio.run(many())
    assert {kept: int(headers[b"x-visual-tokens-kept"]) for kept, headers in sent.items()} == {
        kept: 3 * kept for kept in range(1, 20)
    }


def test_telling_outside_of_a_request_does_nothing() -> None:
    record_images([(576, 64)])
    assert current_usage() is None


def test_an_error_of_the_app_ends_the_request_and_its_telling() -> None:
    async def handle() -> None:
        record_images([(576, 64)])
        raise RuntimeError("no reply")

    with pytest.raises(RuntimeError, match="no reply"):
        _call(handle)
    assert current_usage() is None
