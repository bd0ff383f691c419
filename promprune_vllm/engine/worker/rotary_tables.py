"""Rotary tables of models with M-RoPE: as long as the positions of pruned prompts need them.

How long vLLM makes them depends on the family, the scaling and the minor: four rows a position of the checkpoint
for Qwen2-VL, one for Qwen3-VL since 0.32. Its own switch for more goes with its pruning of videos, and changes
YaRN's frequencies, and with them every answer. Here a table keeps the rows that it has, and gets more of the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from promprune_vllm.engine.compat import model_names, versions
from promprune_vllm.errors import IncompatibleVllmError

versions.require_names(model_names.ROTARY_NAMES)


def tables(model: Any) -> list[Any]:
    """Return the M-RoPE modules of a model; its layers mostly share one."""
    return [module for module in model.modules() if isinstance(module, MRotaryEmbedding)]


def lengthen(model: Any, rows: int) -> None:
    """Give each M-RoPE table of a model at least ``rows`` rows.

    Raises:
        IncompatibleVllmError: The rows that are there are not made as this release knows it.
    """
    for rope in tables(model):
        # In half precision, vLLM for ROCm keeps a second one.
        for name in ("cos_sin_cache", "cos_sin_cache_bf16"):
            table = getattr(rope, name, None)
            if table is not None and len(table) < rows:
                setattr(rope, name, _longer(table, rope, rows))


def _longer(table: Tensor, rope: Any, rows: int) -> Tensor:
    """Return a table of ``(rows, D)`` with the ``(R, D)`` rows of one at its head."""
    last = len(table) - 1  # made once more, to see whether it comes out the same
    scaling = rope.base if rope.scaling_factor is None else rope.scaling_factor
    frequencies = rope._compute_inv_freq(scaling).to(table.device)  # (D / 2,)
    angles = torch.outer(torch.arange(last, rows, dtype=torch.float, device=table.device), frequencies)
    more = (torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.mscale).to(table.dtype)
    # A wrong frequency would turn the last position by whole circles; half precision and kernels round alike.
    if not torch.allclose(more[0], table[-1], atol=0.05):
        raise IncompatibleVllmError(
            f"promprune-vllm cannot lengthen the rotary table of {type(rope).__name__} from {last + 1} rows to "
            f"{rows}: its rows are not cosines and sines of positions and frequencies. Start without pruning, by "
            "setting PROMPRUNE_ENABLED=false, or with a shorter --max-model-len."
        )
    return torch.cat((table, more[1:]))
