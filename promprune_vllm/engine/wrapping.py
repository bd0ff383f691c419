"""How vLLM's own methods are extended in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_WRAPPED = "__promprune_wrapped__"


def wrap(owner: type, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a method by ``wrapper(method)``. Idempotent."""
    original = getattr(owner, name)
    if not hasattr(original, _WRAPPED):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, _WRAPPED, True)
        setattr(owner, name, wrapped)
