"""How vLLM's own methods and functions are extended in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

_WRAPPED = "__promprune_wrapped__"


def wrap(owner: type | ModuleType, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a method or a module's function by ``wrapper(original)``. Idempotent."""
    original = getattr(owner, name)
    if not hasattr(original, _WRAPPED):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, _WRAPPED, True)
        setattr(owner, name, wrapped)
