"""The public operations. Methods import from here; which implementation runs is decided here, by device.

With ``PROMPRUNE_KERNELS=fast``, tensors on a CPU take the fast path of ``cpu_ops``; all others take the
reference. A further device is one more line in ``_on``.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from promprune_vllm.kernels import torch_cosines, torch_greedy, torch_ops
from promprune_vllm.kernels.torch_greedy import facility_location, farthest_points
from promprune_vllm.kernels.torch_ops import (
    complement,
    cross_cosine,
    descending_order,
    finite_rows,
    merge_rows,
    min_max,
    settled,
    share_entropy,
    token_keys,
)

__all__ = [
    "Cosines",
    "complement",
    "cosine_gram",
    "cosines",
    "cross_cosine",
    "descending_order",
    "facility_location",
    "farthest_points",
    "finite_rows",
    "greedy_dpp",
    "in_force",
    "max_min_select",
    "merge_rows",
    "min_max",
    "received_attention",
    "settled",
    "share_entropy",
    "spectral_entropy",
    "token_keys",
    "warm_up",
]

VARIABLE = "PROMPRUNE_KERNELS"
logger = logging.getLogger("vllm.promprune")


class Cosines(Protocol):
    """The cosines of one group, for a method that asks more than one thing of them; see ``torch_cosines``."""

    def matrix(self) -> Tensor:
        """Return ``(N, N)`` float64."""

    def entropy(self) -> Tensor:
        """Return the 0-d float64 spectral entropy."""

    def greedy_dpp(self, order: Tensor, given: Tensor, keep: int) -> Tensor:
        """Return the ``(keep,)`` tokens of a DPP."""


def cosines(features: Tensor) -> Cosines:
    """Return the cosines of ``(N, D)`` tokens, shared by everything that is asked of them."""
    if _on(features.device) is torch_ops:
        return torch_cosines.Cosines(features)
    from promprune_vllm.kernels import cpu_cosines

    return cpu_cosines.Cosines(features)


def cosine_gram(features: Tensor) -> Tensor:
    """See ``torch_ops.cosine_gram``."""
    return _on(features.device).cosine_gram(features)  # type: ignore[no-any-return]


def spectral_entropy(features: Tensor) -> Tensor:
    """See ``torch_ops.spectral_entropy``."""
    return _on(features.device).spectral_entropy(features)  # type: ignore[no-any-return]


def greedy_dpp(gram: Tensor, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
    """See ``torch_greedy.greedy_dpp``."""
    path = _on(gram.device)
    return (torch_greedy if path is torch_ops else path).greedy_dpp(gram, order, given, keep, quality)  # type: ignore[no-any-return]


def max_min_select(gram: Tensor, keep: int) -> Tensor:
    """See ``torch_ops.max_min_select``."""
    return _on(gram.device).max_min_select(gram, keep)  # type: ignore[no-any-return]


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """See ``torch_ops.received_attention``."""
    return _on(queries.device).received_attention(queries, keys, scale)  # type: ignore[no-any-return]


def in_force(device: torch.device) -> str:
    """Return the path tensors of a device take, in words."""
    return f"torch reference on {device.type}" if _on(device) is torch_ops else "numba on CPU"


def warm_up(device: torch.device) -> None:
    """Compile what the path of a device needs, and log which one it is: at start-up, before any request."""
    path = _on(device)
    if path is not torch_ops:
        path.warm_up()
    _log(in_force(device))


@functools.cache
def _log(path: str) -> None:
    logger.info("selection kernels: %s", path)


def _on(device: torch.device) -> ModuleType:
    if device.type != "cpu" or os.environ.get(VARIABLE) != "fast":
        return torch_ops
    from promprune_vllm.kernels import cpu_ops

    return cpu_ops
