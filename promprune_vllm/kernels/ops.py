"""The public operations. Methods import from here; which implementation runs is decided here, by device.

Tensors on a CPU take ``cpu_ops``, those on CUDA ``triton_ops`` where Triton is installed; other devices take the
float64 reference, and with ``PROMPRUNE_KERNELS=reference`` all do. A further device is one more line in ``_path``.
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
    "warm_up",
]

VARIABLE = "PROMPRUNE_KERNELS"
PATHS = ("fast", "reference")
logger = logging.getLogger("vllm.promprune")


class Cosines(Protocol):
    """The cosines of B groups of tokens, for a method that asks more than one thing of them."""

    def matrices(self) -> list[Tensor]:
        """Return ``(N, N)`` float64 of each group."""

    def entropies(self, *, exact: bool = False) -> list[Tensor]:
        """Return the 0-d float64 spectral entropy of each; ``exact``: from float64 eigenvalues."""

    def greedy_dpp(self, orders: Sequence[Tensor], given: Sequence[Tensor], keeps: Sequence[int]) -> list[Tensor]:
        """Return the ``(keep,)`` tokens of a DPP for each; see ``torch_greedy.greedy_dpp``, ``given <= keep``."""


class _Alone:
    """A group by itself, on a path that takes one after the other; see ``torch_cosines``, ``cpu_cosines``."""

    def __init__(self, cosines: torch_cosines.Cosines | cpu_cosines.Cosines) -> None:
        self._cosines = cosines

    def matrices(self) -> list[Tensor]:
        return [self._cosines.matrix()]

    def entropies(self, *, exact: bool = False) -> list[Tensor]:
        return [self._cosines.entropy(exact=exact)]

    def greedy_dpp(self, orders: Sequence[Tensor], given: Sequence[Tensor], keeps: Sequence[int]) -> list[Tensor]:
        return [self._cosines.greedy_dpp(orders[0], given[0], keeps[0])]


def batches(groups: Sequence[Tensor]) -> list[list[int]]:
    """Return which of some groups, ``(N, D)`` tokens each, to take together: the numbers of each batch.

    On CUDA those of one shape and type share every launch. Elsewhere each is a batch of its own, so that no more
    than one Gram is held at a time.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, group in enumerate(groups):
        together = _path(group.device)[0] == "Triton"
        alike.setdefault((group.shape, group.dtype, group.device) if together else (number,), []).append(number)
    found = []
    for numbers in alike.values():
        most = _on(groups[numbers[0]].device).together(groups[numbers[0]].shape) if len(numbers) > 1 else 1
        found += [numbers[start : start + most] for start in range(0, len(numbers), most)]
    return found


def cosines(groups: Sequence[Tensor]) -> Cosines:
    """Return the cosines of one of the ``batches``, shared by everything that is asked of them."""
    name, path, _ = _path(groups[0].device)
    if name == "Triton":
        shared: Cosines = path.Cosines(groups)
        return shared
    (group,) = groups
    if name == "numba":
        from promprune_vllm.kernels import cpu_cosines

        return _Alone(cpu_cosines.Cosines(group))
    return _Alone(torch_cosines.Cosines(group))


def cosine_gram(features: Tensor) -> Tensor:
    """See ``torch_ops.cosine_gram``."""
    result: Tensor = _on(features.device).cosine_gram(features)
    return result


def spectral_entropy(features: Tensor) -> Tensor:
    """See ``torch_ops.spectral_entropy``."""
    result: Tensor = _on(features.device).spectral_entropy(features)
    return result


def greedy_dpp(gram: Tensor, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
    """See ``torch_greedy.greedy_dpp``."""
    path = _on(gram.device)
    result: Tensor = (torch_greedy if path is torch_ops else path).greedy_dpp(gram, order, given, keep, quality)
    return result


def max_min_select(gram: Tensor, keep: int) -> Tensor:
    """See ``torch_ops.max_min_select``."""
    result: Tensor = _on(gram.device).max_min_select(gram, keep)
    return result


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """See ``torch_ops.received_attention``."""
    result: Tensor = _on(queries.device).received_attention(queries, keys, scale)
    return result


def in_force(device: torch.device) -> str:
    """Return the path tensors of a device take, in words."""
    name, _, why = _path(device)
    return f"{name} on {device.type}{why and f' ({why})'}"


def warm_up(device: torch.device) -> None:
    """Compile what the path of a device needs, and log which one it is: at start-up, before any request.

    Raises:
        RuntimeError: It cannot be compiled. No other path is taken instead, which would be slower unnoticed.
    """
    path = _on(device)
    if path is not torch_ops:
        try:
            path.warm_up(device)
        except Exception as error:
            raise RuntimeError(
                f"The selection kernels for {device.type} could not be compiled: {error}. "
                f"{VARIABLE}=reference (--visual-token-kernels reference) selects without them, slower."
            ) from error
    _log(in_force(device))


@functools.cache
def _log(path: str) -> None:
    logger.info("selection kernels: %s", path)


def _on(device: torch.device) -> ModuleType:
    return _path(device)[1]


def _path(device: torch.device) -> tuple[str, ModuleType, str]:
    """Return the path of a device: its name, its module, and where it is not the fast one, why not."""
    chosen = os.environ.get(VARIABLE, "fast")
    if chosen not in PATHS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(PATHS)}, got {chosen!r}.")
    if chosen == "reference":
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
    """Return the path of CUDA, or why there is none. vLLM puts a placeholder in the place of a missing Triton."""
    try:
        from promprune_vllm.kernels import triton_ops
    except (ImportError, AttributeError) as error:
        return None, f"slower: Triton cannot be used: {error}"
    return triton_ops, ""
