"""What would make the host wait for a GPU, found on a machine without one.

Tensors on ``meta`` stand for those on the GPU. They have no values: whatever reads one fails by itself, also where
a shape depends on one. ``NoWaits`` fails on what works without values and waits on a GPU all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("meta")

EIGENVALUES = "_linalg_eigh"
SOLVERS = frozenset({EIGENVALUES, "_linalg_svd", "_linalg_solve_ex", "linalg_inv_ex", "linalg_cholesky_ex"})
"""torch reads on the host whether they have converged; its documentation says that they synchronize."""

METHODS_THAT_WAIT: Mapping[tuple[str, str], str] = {
    ("prunesid", ""): EIGENVALUES,  # the method is principal components
    ("promprune", "exact_entropy"): EIGENVALUES,  # asks for exact eigenvalues; off by default
}
"""Method, and option if only that waits -> the operation. Nothing else may wait on the CUDA path."""


class Wait(AssertionError):
    """The host would wait for the GPU."""


class NoWaits(TorchDispatchMode):
    """Raises ``Wait`` on an operation for which the host would wait.

    Args:
        allowed: Names of operations that may wait.
    """

    def __init__(self, allowed: Collection[str] = ()) -> None:
        super().__init__()
        self._allowed = allowed
        self._literals = _NoLiterals()

    def __enter__(self) -> Any:
        self._literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._literals.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        kwargs = kwargs or {}
        # Of tensors made in inference mode, a mode sees ``to``, and not the copy that it makes.
        assert not func._can_decompose(), f"{name} is not taken apart: leave torch.inference_mode()"
        if name in SOLVERS - frozenset(self._allowed) and any(map(_on_gpu, tree_leaves((args, kwargs)))):
            raise Wait(f"{name} checks its result on the host")
        if name == "index_put_" and _writes_by_mask(*args[:3]):
            raise Wait("a mask as an index: the host counts what it selects")
        if name == "_to_copy" and kwargs.get("device") is not None:
            _check_copy(args[0], kwargs["device"], kwargs.get("non_blocking", False))
        elif name == "copy_":
            _check_copy(args[1], args[0].device, kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        else:
            _check_together(name, tree_leaves((args, kwargs)))
        return func(*args, **kwargs)


class _NoLiterals(TorchFunctionMode):
    """Fails on numbers that Python hands to a GPU: torch copies them from the host, and waits."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        makers = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        if func in makers and _on_gpu(result) and not isinstance(args[-1], Tensor):
            raise Wait(f"{func.__name__} copies numbers from the host to the GPU")
        return result


def to_gpu(values: Any) -> Any:
    """Return a structure with its tensors on the stand-in for a GPU, and made outside of inference mode."""
    with torch.inference_mode(False):
        return tree_map_only(Tensor, lambda tensor: tensor.to(GPU), values)


def _check_copy(source: Tensor, device: torch.device, non_blocking: bool) -> None:
    if source.device != device and not non_blocking:
        raise Wait(f"a copy of {tuple(source.shape)} from {source.device} to {device} that the host waits for")


def _writes_by_mask(target: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> bool:
    masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
    return _on_gpu(target) and bool(masks) and values.numel() != 1


def _check_together(name: str, values: list[Any]) -> None:
    """Indexing takes indices from the host, and copies them itself."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    host = [value for value in tensors if not _on_gpu(value) and value.ndim]
    if host and len(host) < len(tensors):
        raise Wait(f"{name} of a tensor on the GPU and {tuple(host[0].shape)} on the host")


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == GPU
