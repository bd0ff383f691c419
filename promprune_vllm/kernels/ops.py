"""The operations that methods import. The device of the tensors decides which implementation runs.

Tensors on a CPU use ``cpu_ops``, tensors on CUDA ``triton_ops`` if Triton is installed. Other devices use the
float64 reference; with ``PROMPRUNE_KERNELS=reference`` all devices do. To add a device, add one line to ``_path``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

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
    quantized,
    share_entropy,
    token_keys,
    unit_rows,
)

if TYPE_CHECKING:
    from promprune_vllm.kernels import cpu_cosines

__all__ = [
    "Cosines",
    "batches",
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
    "quantized",
    "received_attention",
    "share_entropy",
    "spectral_entropy",
    "token_keys",
    "unit_rows",
    "warm_up",
]

VARIABLE = "PROMPRUNE_KERNELS"
PATHS = ("fast", "reference")
logger = logging.getLogger("vllm.promprune")


class Cosines(Protocol):
    """The cosines of B groups of tokens, for methods that use them more than once."""

    def matrices(self) -> list[Tensor]:
        """Return the ``(N, N)`` float64 cosines of each group."""

    def entropies(self, *, exact: bool = False) -> list[Tensor]:
        """Return the 0-d float64 spectral entropy of each group; ``exact``: from float64 eigenvalues."""

    def greedy_dpp(
        self,
        orders: Sequence[Tensor],
        given: Sequence[Tensor],
        keeps: Sequence[int],
        qualities: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the ``(keep,)`` tokens of a DPP per group; see ``torch_greedy.greedy_dpp``, ``given <= keep``."""


class _SingleGroup:
    """A batch of one group, for paths that process one group at a time: ``torch_cosines``, ``cpu_cosines``."""

    def __init__(self, cosines: torch_cosines.Cosines | cpu_cosines.Cosines) -> None:
        self._cosines = cosines

    def matrices(self) -> list[Tensor]:
        return [self._cosines.matrix()]

    def entropies(self, *, exact: bool = False) -> list[Tensor]:
        return [self._cosines.entropy(exact=exact)]

    def greedy_dpp(
        self,
        orders: Sequence[Tensor],
        given: Sequence[Tensor],
        keeps: Sequence[int],
        qualities: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        quality = None if qualities is None else qualities[0]
        return [self._cosines.greedy_dpp(orders[0], given[0], keeps[0], quality)]


def batches(groups: Sequence[Tensor]) -> list[list[int]]:
    """Split groups of ``(N, D)`` tokens into batches to process together; returns the group numbers of each batch.

    On CUDA, groups of one shape and dtype share every launch. Elsewhere each group is its own batch, so that only
    one Gram is in memory at a time.
    """
    numbers_by_kind: dict[tuple[Any, ...], list[int]] = {}
    for number, group in enumerate(groups):
        batched = _path(group.device)[0] == "Triton"
        kind = (group.shape, group.dtype, group.device) if batched else (number,)
        numbers_by_kind.setdefault(kind, []).append(number)
    result = []
    for numbers in numbers_by_kind.values():
        most = (
            _module(groups[numbers[0]].device).most_per_launch(groups[numbers[0]].shape) if len(numbers) > 1 else 1
        )
        result += [numbers[start : start + most] for start in range(0, len(numbers), most)]
    return result


def cosines(groups: Sequence[Tensor]) -> Cosines:
    """Return the cosines of the groups of one batch, computed once however often they are used."""
    name, path, _ = _path(groups[0].device)
    if name == "Triton":
        shared: Cosines = path.Cosines(groups)
        return shared
    (group,) = groups
    if name == "numba":
        from promprune_vllm.kernels import cpu_cosines

        return _SingleGroup(cpu_cosines.Cosines(group))
    return _SingleGroup(torch_cosines.Cosines(group))


def cosine_gram(features: Tensor) -> Tensor:
    """See ``torch_ops.cosine_gram``."""
    result: Tensor = _module(features.device).cosine_gram(features)
    return result


def spectral_entropy(features: Tensor) -> Tensor:
    """See ``torch_ops.spectral_entropy``."""
    result: Tensor = _module(features.device).spectral_entropy(features)
    return result


def greedy_dpp(gram: Tensor, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
    """See ``torch_greedy.greedy_dpp``."""
    path = _module(gram.device)
    result: Tensor = (torch_greedy if path is torch_ops else path).greedy_dpp(gram, order, given, keep, quality)
    return result


def max_min_select(gram: Tensor, keep: int) -> Tensor:
    """See ``torch_ops.max_min_select``."""
    result: Tensor = _module(gram.device).max_min_select(gram, keep)
    return result


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """See ``torch_ops.received_attention``."""
    result: Tensor = _module(queries.device).received_attention(queries, keys, scale)
    return result


def in_force(device: torch.device) -> str:
    """Return a description of the implementation that runs for a device."""
    name, _, reason = _path(device)
    return f"{name} on {device.type}{reason and f' ({reason})'}"


def warm_up(device: torch.device) -> None:
    """Compile the kernels for a device, and log which implementation runs: at start-up, before any request.

    Raises:
        RuntimeError: The kernels cannot be compiled. There is no silent fallback to a slower implementation.
    """
    path = _module(device)
    if path is not torch_ops:
        try:
            path.warm_up(device)
        except Exception as error:
            raise RuntimeError(
                f"The selection kernels for {device.type} could not be compiled: {error}. "
                f"{VARIABLE}=reference (--visual-token-kernels reference) runs without them, more slowly."
            ) from error
    _log(in_force(device))


@functools.cache
def _log(path: str) -> None:
    logger.info("selection kernels: %s", path)


def _module(device: torch.device) -> ModuleType:
    return _path(device)[1]


def _path(device: torch.device) -> tuple[str, ModuleType, str]:
    """Return the implementation for a device: its name, its module and, unless it is the fast one, why not."""
    setting = os.environ.get(VARIABLE, "fast")
    if setting not in PATHS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(PATHS)}, got {setting!r}.")
    if setting == "reference":
        return "torch reference", torch_ops, f"{VARIABLE}=reference"
    if device.type == "cpu":
        from promprune_vllm.kernels import cpu_ops

        return "numba", cpu_ops, ""
    if device.type != "cuda":
        return "torch reference", torch_ops, f"there is no fast path for {device.type}"
    path, missing = _triton()
    return ("torch reference", torch_ops, missing) if path is None else ("Triton", path, "")


@functools.cache
def _triton() -> tuple[ModuleType | None, str]:
    """Return the module for CUDA, or why it cannot be used. vLLM replaces a missing Triton with a placeholder."""
    try:
        from promprune_vllm.kernels import triton_ops
    except (ImportError, AttributeError) as error:
        return None, f"slower: Triton cannot be used: {error}"
    return triton_ops, ""
