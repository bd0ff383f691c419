"""Launching of Triton kernels, on a GPU or, for tests, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU, step by step. The interpreter cannot multiply bfloat16, so tiles are widened."""


def launch(kernel: Any, grid: Sequence[int], first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, whichever device is current."""
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[tuple(grid)](first, *arguments, **constants)


def blocks(n: int, block: int) -> int:
    """Return how many blocks cover ``n``."""
    return -(-n // block)
