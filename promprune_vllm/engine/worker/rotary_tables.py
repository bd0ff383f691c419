"""Lengthens the rotary tables of models with M-RoPE, for the positions that pruned prompts reach.

The length that vLLM chooses depends on the family, the scaling and the minor: four rows per position of the
checkpoint for Qwen2-VL, one for Qwen3-VL since 0.32. vLLM's own option for longer tables belongs to its pruning of
videos, and changes YaRN's frequencies and so every answer. Here a table keeps its rows and gets more of the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from promprune_vllm.errors import IncompatibleVllmError


def tables(model: Any) -> list[Any]:
    """Return the M-RoPE modules of a model; usually all layers share one."""
    return [module for module in model.modules() if isinstance(module, MRotaryEmbedding)]


def lengthen(model: Any, rows: int) -> None:
    """Give each M-RoPE table of a model at least ``rows`` rows.

    Raises:
        IncompatibleVllmError: The existing rows do not follow the formula that this release expects.
    """
    for rope in tables(model):
        # With half precision, vLLM for ROCm has a second table.
        for name in ("cos_sin_cache", "cos_sin_cache_bf16"):
            table = getattr(rope, name, None)
            if table is not None and len(table) < rows:
                setattr(rope, name, _extend(table, rope, rows))


def _extend(table: Tensor, rope: Any, rows: int) -> Tensor:
    """Return a table of ``(rows, D)`` that begins with the ``(R, D)`` rows of the given one."""
    last = len(table) - 1  # computed again, to check the formula
    scaling = rope.base if rope.scaling_factor is None else rope.scaling_factor
    frequencies = rope._compute_inv_freq(scaling).to(table.device)  # (D / 2,)
    angles = torch.outer(torch.arange(last, rows, dtype=torch.float, device=table.device), frequencies)
    computed = (torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.mscale).to(table.dtype)
    # A wrong frequency would rotate the last position by whole turns; rounding differs far less.
    if not torch.allclose(computed[0], table[-1], atol=0.05):
        raise IncompatibleVllmError(
            f"promprune-vllm cannot lengthen the rotary table of {type(rope).__name__} from {last + 1} rows to "
            f"{rows}: its rows are not cosines and sines of positions times frequencies. Set "
            "PROMPRUNE_ENABLED=false to start without pruning, or use a shorter --max-model-len."
        )
    return torch.cat((table, computed[1:]))
