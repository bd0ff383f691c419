"""The control ``downsample`` as a client can have it: an image with fewer pixels has fewer tokens.

This works where a smaller image has fewer tokens, needs no plugin and saves the tower's work too; it is what
VTC-Bench (arXiv 2510.07143) compares methods with. On a tower with a fixed number of tokens, the server's method
of the same name takes means of tokens instead. So it does below the tokens of the smallest image, which are those
of a whole tile where images are cut into tiles. Which of the two it is follows from what the server counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import httpx

from promprune_vllm.core.budget import FIELD, FULL
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.sender import DOWNSAMPLE, Size, Way
from promprune_vllm.evaluation.target import STATE_PATH, Target, tls_context

_STEPS = 64  # sizes in one request; as many as the server counts
_TIMEOUT_SECONDS = 60


class NoSuchSizeError(EvaluationError):
    """An image cannot have as few tokens as a budget leaves."""


def on_the_client(target: Target, ways: Sequence[Way], size: Size) -> tuple[tuple[Way, ...], list[str]]:
    """Return the ways with ``downsample`` on the client, where smaller images have fewer tokens, and what differs.

    Args:
        target: Server to ask.
        ways: Methods with budgets.
        size: Width and height of the images, in pixels.
    """
    if all(way.method != DOWNSAMPLE for way in ways) or not takes_any_size(target, size):
        return tuple(ways), []
    asked, notes = [], []
    for way in ways:
        try:
            is_smaller = way.method == DOWNSAMPLE
            asked.append(replace(way, smaller=size_within(target, way.budget, size)) if is_smaller else way)
        except NoSuchSizeError as error:
            notes.append(instead(target, way, error))
            if pools(target):
                asked.append(way)
    return tuple(asked), notes


def pools(target: Target) -> bool:
    """Return whether the server takes means of tokens for ``downsample``."""
    return DOWNSAMPLE in target.image_methods


def instead(target: Target, way: Way, error: NoSuchSizeError) -> str:
    """Say what becomes of a budget that no smaller image has."""
    if pools(target):
        return f"At budget {way.budget_text}, {DOWNSAMPLE!r} is the server's method, means of tokens. {error}"
    return (
        f"{DOWNSAMPLE!r} was left out at budget {way.budget_text}. {error} Use larger --budgets, or allow the "
        f"server's method, which takes means of tokens: --visual-token-allow-methods {DOWNSAMPLE}."
    )


def takes_any_size(target: Target, size: Size) -> bool:
    """Return whether an image with half of this width and height has another number of tokens."""
    whole, half = _count(target, [size, _scaled(size, 0.5)])
    return half != whole


def size_within(target: Target, budget: int | float | str, size: Size) -> Size:
    """Return the size of the largest image that has no more tokens than a budget leaves of the whole image.

    Args:
        target: Server to ask.
        budget: Tokens or a share.
        size: Width and height of the whole image, in pixels.

    Raises:
        NoSuchSizeError: Even the smallest image has more tokens.
    """
    (most,) = _count(target, [size], budget)
    low, step = 0.0, 1 / _STEPS
    for _ in range(2):  # the second time between the neighbors that the first has found
        scales = [low + step * number for number in range(1, _STEPS + 1)]
        counts = _count(target, [_scaled(size, scale) for scale in scales])
        fits = [scale for scale, count in zip(scales, counts, strict=True) if count <= most]
        if not fits:
            break
        low, step = fits[-1], step / _STEPS
    if not low:
        raise NoSuchSizeError(
            f"No smaller image has {most} tokens or fewer here: the smallest that this model takes has "
            f"{min(counts)}."
        )
    return _scaled(size, low)


def _count(target: Target, sizes: Sequence[Size], budget: int | float | str = FULL) -> list[int]:
    """Return how many tokens the server counts that images of these sizes keep."""
    body = {"images": [{"width": width, "height": height} for width, height in sizes], FIELD: budget}
    url = f"{target.url}{STATE_PATH}/count"
    try:
        reply = httpx.post(url, json=body, headers=target.headers, timeout=_TIMEOUT_SECONDS, verify=tls_context())
        reply.raise_for_status()
        return [int(image["kept"]) for image in reply.json()["images"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{url} does not count the tokens of images by their sizes, which {DOWNSAMPLE!r} needs ({error}). "
            f"Update the plugin of that server, or leave {DOWNSAMPLE} out of --methods."
        ) from error


def _scaled(size: Size, scale: float) -> Size:
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height
