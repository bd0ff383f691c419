"""Selection of covering tokens on CUDA, by the rules of ``torch_greedy`` and without the host.

One program per image takes a panel of ``PANEL`` tokens at a time: it keeps the explained volume of all tokens in
registers, and per token taken reads one row of the matrix and the panel's earlier rows. For small images and few
kept tokens (``ONE_PANEL``), one panel is enough. Otherwise, what a panel explains is subtracted from the whole
matrix, by one program per tile, so later steps are as short as those in the first panel.

Everything is float64, as in the reference; only the input matrix can differ. The number of given tokens is read on
the device: panels that turn out not to be needed do nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from promprune_vllm.kernels.torch_greedy import EXHAUSTED
from promprune_vllm.kernels.triton_launch import blocks, launch

ONE_PANEL = (800, 64)
"""Largest numbers of tokens, and of kept tokens, for a selection in one launch."""
PANEL, TILE = 32, 64
LEAST_BLOCK = 1024
"""Smallest block, also for smaller images: every block size is compiled, and start-up should not take minutes."""
MOST_TOKENS = 4096
"""Most tokens that one program can hold in registers; their matrix takes 128 MiB."""


@triton.jit
def _round(x):
    """Round float64 below 2**51 to integers, half to even: adding this number leaves no bits for a fraction."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _decide(cost, closed, rank, j):
    """Return the next token, and whether the rule chose it.

    It is the open token of least cost in steps of 2**-32, ties to the lowest index; else the next in the order.
    """
    steps = tl.where(closed, float("inf"), _round(cost * 4294967296.0))
    lowest = tl.min(steps, 0)
    by_rule = lowest < float("inf")
    least = tl.min(tl.where(steps == lowest, j, 2147483647), 0)
    next_in_order = tl.argmin(rank, 0)
    return tl.where(by_rule, least, next_in_order), by_rule


@triton.jit(do_not_specialize=["n", "keep"])
def _nearest(gram, order, given, out, n, keep, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store each token's largest cosine to a given one; -inf if none is given."""
    image = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.minimum(tl.load(given + image), keep).to(tl.int32)
    best = tl.full((BLOCK,), float("-inf"), tl.float64)
    for start in range(0, count, ROWS):
        r = start + tl.arange(0, ROWS)
        token = tl.load(order + image * n + r, mask=r < count, other=0)
        row = (image * n + token)[:, None] * n + j[None, :]
        value = tl.load(gram + row, mask=(r < count)[:, None] & (j < n)[None, :], other=float("-inf"))
        best = tl.maximum(best, tl.max(value, 0))
    tl.store(out + image * n + j, best, mask=j < n)


@triton.jit(do_not_specialize=["first", "n", "keep"])
def _panel(
    gram, nearest, quality, given, rank, acc, factors, picks, first, n, keep,
    SIZE: tl.constexpr, WEIGHTED: tl.constexpr, BOUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take up to ``SIZE`` new tokens of one image, starting with the new token number ``first``."""
    image = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < n
    gram += image * n * n
    factors += image * SIZE * n
    count = tl.minimum(tl.load(given + image), keep).to(tl.int32)
    explained = tl.load(acc + image * n + j, mask=inside, other=1.0)
    ranks = tl.load(rank + image * n + j, mask=inside, other=n)
    for step in range(0, tl.minimum(SIZE, keep - count - first)):
        if WEIGHTED:
            weight = tl.load(quality + image * n + j, mask=inside, other=0)
            cost = -weight * tl.sqrt(tl.maximum(1.0 - explained, 0.0))
        else:
            cost = tl.sqrt(explained)
        if (first + step == 0) & (count > 0):
            cost = tl.load(nearest + image * n + j, mask=inside, other=0)
        pick, by_rule = _decide(cost, (ranks >= n) | (explained >= 1.0 - BOUND), ranks, j)
        tl.store(picks + image * keep + count + first + step, pick.to(tl.int64))
        row = tl.load(gram + pick.to(tl.int64) * n + j, mask=inside, other=0)
        for s in range(0, step, 4):
            for k in tl.static_range(4):
                earlier = factors + (s + k) * n
                along = tl.load(earlier + pick, mask=s + k < step, other=0)
                row -= along * tl.load(earlier + j, mask=inside & (s + k < step), other=0)
        left = 1.0 - tl.sum(tl.where(j == pick, explained, 0.0), 0)
        row = tl.where(by_rule, row / tl.sqrt(tl.maximum(left, BOUND)), 0.0)
        tl.store(factors + step * n + j, row, mask=inside)
        explained += row * row
        ranks = tl.where(j == pick, n, ranks)
        tl.debug_barrier()  # the next step reads what other threads wrote
    tl.store(acc + image * n + j, explained, mask=inside)
    tl.store(rank + image * n + j, ranks, mask=inside)


@triton.jit(do_not_specialize=["first", "n", "keep"])
def _subtract_panel(gram, factors, given, first, n, keep, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Subtract what a panel explains from one tile of the matrix."""
    image = tl.program_id(2).to(tl.int64)
    count = tl.minimum(tl.load(given + image), keep).to(tl.int32)
    used = tl.minimum(SIZE, keep - count - first)
    if used == SIZE:  # otherwise this was the last panel
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tile = gram + image * n * n + i.to(tl.int64)[:, None] * n + j[None, :]
        inside = (i < n)[:, None] & (j < n)[None, :]
        value = tl.load(tile, mask=inside, other=0)
        factors += image * SIZE * n
        for s in range(0, SIZE):
            left = tl.load(factors + s * n + i, mask=i < n, other=0)
            right = tl.load(factors + s * n + j, mask=j < n, other=0)
            value -= left[:, None] * right[None, :]
        tl.store(tile, value, mask=inside)


def greedy_dpp(gram: Tensor, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
    """Return the tokens of a DPP for each of B images; see ``torch_greedy.greedy_dpp``.

    Args:
        gram: ``(B, N, N)`` float64, N at most ``MOST_TOKENS``. Not changed.
        order: ``(B, N)`` int64.
        given: ``(B,)`` int64, on the device.
        keep: Size of each set.
        quality: ``(B, N)`` float64.

    Returns:
        ``(B, keep)`` int64.
    """
    count, n = order.shape
    one_panel = n <= ONE_PANEL[0] and keep <= ONE_PANEL[1]
    size = ONE_PANEL[1] if one_panel else PANEL
    gram = gram.contiguous() if one_panel else gram.clone(memory_format=torch.contiguous_format)
    given, order = given.contiguous(), order.contiguous()
    nearest = gram.new_empty((count, n))
    launch(_nearest, (blocks(n, TILE), count), gram, order, given, nearest, n, keep, ROWS=16, BLOCK=TILE)
    rank, acc = initial_state(gram.diagonal(dim1=1, dim2=2), order, given)
    picks, factors = order[:, :keep].clone(), gram.new_empty((count, size, n))
    block = max(LEAST_BLOCK, triton.next_power_of_2(n))
    weights = nearest if quality is None else quality.contiguous()
    for first in range(0, keep, size):
        launch(
            _panel, (count,), gram, nearest, weights, given, rank, acc, factors, picks, first, n, keep,
            SIZE=size, WEIGHTED=quality is not None, BOUND=EXHAUSTED, BLOCK=block,
            num_warps=min(16, max(4, block // 128)),
        )  # fmt: skip
        if first + size < keep:
            grid = (blocks(n, TILE), blocks(n, TILE), count)
            launch(_subtract_panel, grid, gram, factors, given, first, n, keep, SIZE=size, BLOCK=TILE)
    return picks


def initial_state(diagonal: Tensor, order: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's rank in the order, N for the given ones, and its explained volume at the start.

    Args:
        diagonal: ``(B, N)`` cosine of each token with itself: the rule never chooses zero rows.
        order: ``(B, N)`` int64.
        given: ``(B,)`` int64.

    Returns:
        ``(B, N)`` int32 and ``(B, N)`` float64.
    """
    n = order.shape[1]
    numbers = torch.arange(n, dtype=torch.int32, device=order.device).expand_as(order)
    rank = torch.empty_like(numbers, memory_format=torch.contiguous_format).scatter_(1, order, numbers)
    return torch.where(rank < given[:, None], n, rank).to(torch.int32), (diagonal < 0.5).to(torch.float64)
