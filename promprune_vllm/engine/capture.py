"""Reads what a vision tower's attention looked at, without asking it for attention maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce


@contextmanager
def cls_attention(attention: Any) -> Iterator[list[Tensor]]:
    """Collect the attention CLS pays to every patch while the block is open.

    One query row of the layer: O(N) memory, and the tower keeps its fast attention kernel.

    Args:
        attention: A ``CLIPAttention`` of vLLM. Its inner ``attn`` is called with q, k, v of
            ``(B, 1 + N, heads * head_dim)``; heads are those of this tensor-parallel rank.

    Yields:
        A list that gets one ``(B, N)`` float32 tensor per call of the layer: softmax over CLS and patches,
        mean over all heads of all ranks, the CLS column dropped and the rest not renormalised.
    """
    rows: list[Tensor] = []

    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        q, k = args[0], args[1]
        batch, length, _width = k.shape
        heads = attention.num_heads_per_partition
        cls = q[:, 0].float().view(batch, heads, 1, -1)  # (B, H, 1, d)
        keys = k.float().view(batch, length, heads, -1).permute(0, 2, 3, 1)  # (B, H, d, 1 + N)
        weights = torch.softmax((cls @ keys) * attention.scale, dim=-1)  # (B, H, 1, 1 + N)
        mean = weights[:, :, 0, 1:].mean(dim=1)  # (B, N)
        if attention.tp_size > 1:
            # Without this each rank would select by its own heads, and the ranks would disagree.
            mean = tensor_model_parallel_all_reduce(mean) / attention.tp_size
        rows.append(mean)

    handle = attention.attn.register_forward_pre_hook(hook)
    try:
        yield rows
    finally:
        handle.remove()
