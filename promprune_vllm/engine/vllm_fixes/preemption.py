"""Images of requests that are preempted: their pixels stay with the worker.

vLLM (0.29 to 0.32) leaves out the pixels of images whose tokens the prefix cache covers when a request is first
scheduled, since nobody would encode them. A request that is preempted then, and whose blocks are given to others,
has to encode them after all: the worker finds no pixels, skips the image, and the whole engine dies of ``Encoder
cache miss``. Few KV blocks and images that are asked about again are enough, with this plugin or without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def keep_mm_data(original: Any) -> Any:  # noqa: ARG001
    """Replace what leaves pixels out: they are sent along, whatever the prefix cache holds."""

    def strip_covered_mm_data(mm_features: Sequence[Any], *_: Any, **__: Any) -> Sequence[Any]:
        return mm_features

    return strip_covered_mm_data
