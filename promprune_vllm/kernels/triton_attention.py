"""Received attention on CUDA in two passes over the scores, which are never stored.

A column of the attention map needs the sums of all rows first: pass 1 computes each row's log-sum-exp, pass 2 sums
each column of ``exp(score - log-sum-exp)``. Memory is O(P H). Sums over rows and over heads have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from promprune_vllm.kernels.triton_launch import INTERPRETED, blocks, launch

BLOCKS = {2: 64, 4: 32}
"""Side of a tile, by bytes per number: larger float32 tiles do not fit into registers."""


@triton.jit
def _scores(q, k, i, j, patches, heads, width, scale, WIDEN: tl.constexpr, WIDTH: tl.constexpr):
    """Return scores of a block of queries and keys of one head, ``(BLOCK, BLOCK)`` float32; -inf past the keys."""
    column = tl.arange(0, WIDTH)
    left = tl.load(
        q + i.to(tl.int64)[:, None] * heads * width + column[None, :],
        mask=(i < patches)[:, None] & (column < width)[None, :],
        other=0,
    )
    right = tl.load(
        k + j.to(tl.int64)[:, None] * heads * width + column[None, :],
        mask=(j < patches)[:, None] & (column < width)[None, :],
        other=0,
    )
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    score = tl.dot(left, tl.trans(right), input_precision="ieee") * tl.load(scale)
    return tl.where((j < patches)[None, :], score, float("-inf"))


@triton.jit(do_not_specialize=["patches"])
def _log_sums(
    q, k, scale, out, patches, heads, width, WIDEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Store ``log sum_j exp(score_ij)`` for the rows of one block and head."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, patches, BLOCK):
        j = start + tl.arange(0, BLOCK)
        score = _scores(q + head * width, k + head * width, i, j, patches, heads, width, scale, WIDEN, WIDTH)
        higher = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
        top = higher
    tl.store(out + head.to(tl.int64) * patches + i, top + tl.log(total), mask=i < patches)


@triton.jit(do_not_specialize=["patches"])
def _columns(
    q,
    k,
    scale,
    log_sums,
    out,
    patches,
    heads,
    width,
    WIDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the sums of one block of columns of one head's map."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, patches, BLOCK):
        i = start + tl.arange(0, BLOCK)
        score = _scores(q + head * width, k + head * width, i, j, patches, heads, width, scale, WIDEN, WIDTH)
        logs = tl.load(log_sums + head.to(tl.int64) * patches + i, mask=i < patches, other=float("inf"))
        total += tl.sum(tl.exp(score - logs[:, None]), 0).to(tl.float64)
    tl.store(out + head.to(tl.int64) * patches + j, total, mask=j < patches)


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return ``(P,)`` float32 as ``torch_ops.received_attention`` does.

    Args:
        queries: ``(P, H, d)`` float32, bfloat16 or float16.
        keys: ``(P, H, d)`` of the same type.
        scale: Factor of the scores.
    """
    q, k = queries.detach().contiguous(), keys.detach().contiguous()
    patches, heads, width = q.shape
    block = BLOCKS[q.element_size()]
    log_sums = q.new_empty((heads, patches), dtype=torch.float32)
    columns = q.new_empty((heads, patches), dtype=torch.float64)
    factor = torch.full((), scale, dtype=torch.float32, device=q.device)  # a float argument is specialized for 1.0
    sizes = {"WIDEN": INTERPRETED, "WIDTH": max(16, triton.next_power_of_2(width)), "BLOCK": block}
    grid = (blocks(patches, block), heads)
    launch(_log_sums, grid, q, k, factor, log_sums, patches, heads, width, **sizes)
    launch(_columns, grid, q, k, factor, log_sums, columns, patches, heads, width, **sizes)
    return (columns.sum(dim=0) / (heads * patches)).float()
