"""Stops an engine from starting, without ending vLLM's other commands.

vLLM loads plugins for every command, even `vllm --version`. So an error in the settings is kept until an engine is
configured.
"""

from __future__ import annotations

from typing import Any

from promprune_vllm.errors import PromPruneError

_errors: list[PromPruneError] = []


def postpone(error: PromPruneError) -> None:
    """Keep an error, to be raised when an engine is configured. ``patches`` wraps that step."""
    _errors[:] = [error]


def raise_postponed(original: Any) -> Any:
    """Wrap the configuration of an engine: raise the error that was postponed."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _errors:
            raise _errors[0]
        return original(self, *args, **kwargs)

    return create_engine_config
