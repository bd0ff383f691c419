"""How vLLM's own methods and functions are extended in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

_WRAPPERS = "__promprune_wrappers__"


def wrap(owner: type | ModuleType, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a method or a module's function by ``wrapper(original)``. Idempotent for each wrapper.

    Several wrappers may extend one method; a later one goes around the earlier ones.
    """
    original = getattr(owner, name)
    there = getattr(original, _WRAPPERS, ())
    wrapper_name = f"{wrapper.__module__}.{wrapper.__qualname__}"
    if wrapper_name not in there:
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, _WRAPPERS, (*there, wrapper_name))
        setattr(owner, name, wrapped)
