"""Workaround for preempted requests with images: the worker always gets the pixels.

When vLLM (0.29 to 0.33) first schedules a request, it leaves out the pixels of images that the prefix cache
covers, because they need no encoding. If the request is then preempted and loses its blocks, the images must be
encoded after all: the worker finds no pixels, skips the image, and the engine dies with ``Encoder cache miss``.
Few KV blocks and repeated images are enough, with or without this plugin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def keep_mm_data(original: Any) -> Any:  # noqa: ARG001
    """Replace the function that leaves pixels out: always send them."""

    def strip_covered_mm_data(mm_features: Sequence[Any], *_: Any, **__: Any) -> Sequence[Any]:
        return mm_features

    return strip_covered_mm_data
