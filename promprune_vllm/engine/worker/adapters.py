"""Text that the worker embeds for itself: without the adapters of vLLM's ``--enable-lora``.

vLLM wraps the language model's embedding then. The wrapper takes its tokens for those of the running step, one by
one, to find the adapter of each. The text of a method or between frames is not among them, so it would get rows of
any adapter, or rows beyond the end. It is embedded with the layer inside the wrapper, as without an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def wrapped_embeddings(model: nn.Module) -> list[Any]:
    """Return the modules that wrap an embedding of a model for adapters; none if adapters are off."""
    return [each for each in model.modules() if hasattr(getattr(each, "base_layer", None), "num_embeddings")]


@contextmanager
def without_adapters(wrappers: list[Any]) -> Iterator[None]:
    """Have each of ``wrapped_embeddings`` do what the layer inside it does."""
    try:
        for wrapper in wrappers:
            wrapper.forward = wrapper.base_layer.forward
        yield
    finally:
        for wrapper in wrappers:
            vars(wrapper).pop("forward", None)
