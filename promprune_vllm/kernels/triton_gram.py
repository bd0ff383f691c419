"""Products of rows with rows on CUDA: cosines in float64, and the squares of the entropy chain in float32.

Tokens are multiplied in their own dtype, so that 16-bit tokens use tensor cores, whose products are exact. They
are summed in float32 within ``CHUNK`` columns and in float64 across chunks: N^2 D / 64 float64 additions. A cosine
is then accurate to about 1e-8 if all columns weigh the same, and to 1e-6 if those of one chunk outweigh all
others. The sums are divided by the lengths afterwards, in float64.

The tile size does not depend on the GPU or the batch, every sum has a fixed order, and only tiles on and below the
diagonal are computed: the result is symmetric to the last bit, and the same in every run on one type of GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from promprune_vllm.kernels.triton_launch import INTERPRETED, blocks, launch

TILES = (32, 64)
"""Side of a tile up to 1024 rows, and beyond: small matrices need many tiles to fill a GPU."""
CHUNK, CHAIN_CHUNK = 64, 32
"""Columns summed in float32 before they are added to the total, for tokens and for the chain."""


@triton.jit(do_not_specialize=["d"])
def _prepare(x, out, inverse, d, RESCALE: tl.constexpr, BLOCK: tl.constexpr):
    """Scale each row by a power of two so that its largest entry is about 1, and store 1 / length.

    Rows that are not finite become zero; zero rows get the inverse length 0.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, d, BLOCK):
        value = tl.load(x + row * d + start + column, mask=start + column < d, other=0).to(tl.float32)
        finite = tl.abs(value) < float("inf")
        broken += tl.where(finite, 0, 1)
        largest = tl.maximum(largest, tl.where(finite, tl.abs(value), 0))
    factor = 1.0
    if RESCALE:
        exponent = (tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23) & 0xFF
        shift = tl.minimum(tl.maximum(127 - exponent, -126), 126)
        factor = ((shift + 127) << 23).to(tl.float32, bitcast=True)
    whole = tl.sum(broken, 0) == 0
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, d, BLOCK):
        inside = start + column < d
        value = tl.load(x + row * d + start + column, mask=inside, other=0).to(tl.float32)
        value = tl.where(whole, value * factor, 0).to(out.dtype.element_ty)
        tl.store(out + row * d + start + column, value, mask=inside)
        wide = value.to(tl.float32).to(tl.float64)
        squares += wide * wide
    length = tl.sqrt(tl.sum(squares, 0))
    tl.store(inverse + row, tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0))


@triton.jit
def _products(
    x, rows, columns, n, d, TYPE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, CHUNK: tl.constexpr
):
    """Return the inner products of a block of rows with another block, ``(BLOCK, BLOCK)``."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), TYPE)
    for start in range(0, d, CHUNK):
        column = start + tl.arange(0, CHUNK)
        left = tl.load(
            x + rows[:, None] * d + column[None, :], mask=(rows < n)[:, None] & (column < d)[None, :], other=0
        )
        right = tl.load(
            x + columns[:, None] * d + column[None, :],
            mask=(columns < n)[:, None] & (column < d)[None, :],
            other=0,
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, tl.trans(right), input_precision=PRECISION).to(TYPE)
    return total


@triton.jit(do_not_specialize=["n"])
def _gram(
    x, inverse, out, n, d, COSINES: tl.constexpr, WIDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Store one tile of the rows' inner products in float64, or of their cosines, and its mirror image."""
    image = tl.program_id(2).to(tl.int64)
    if tl.program_id(1) <= tl.program_id(0):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = _products(x + image * n * d, i, j, n, d, tl.float64, "ieee", WIDEN, CHUNK)
        if COSINES:
            left = tl.load(inverse + image * n + i, mask=i < n, other=0)
            right = tl.load(inverse + image * n + j, mask=j < n, other=0)
            value = value * (left[:, None] * right[None, :])
            one = tl.where(left > 0, 1.0, 0.0).to(tl.float64)
            value = tl.where(i[:, None] == j[None, :], one[:, None], value)
        lower = (i < n)[:, None] & (j[None, :] <= i[:, None])
        out += image * n * n
        tl.store(out + i[:, None] * n + j[None, :], value, mask=lower)
        tl.store(out + j[None, :] * n + i[:, None], value, mask=lower)


@triton.jit
def _square(
    x,
    before,
    out,
    moments,
    n,
    ADVANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Store one tile of ``x x``, or of ``2 x - x x`` with its part of the moments; n is a multiple of 16."""
    image = tl.program_id(2).to(tl.int64)
    if tl.program_id(1) <= tl.program_id(0):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        lower = (i < n)[:, None] & (j[None, :] <= i[:, None])
        tile = i[:, None] * n + j[None, :]
        x += image * n * n
        value = _products(x, i, j, n, n, tl.float32, PRECISION, False, CHUNK)
        if ADVANCE:
            current = tl.load(x + tile, mask=lower, other=0)
            value = tl.where(lower, 2 * current - value, 0)
            earlier = tl.load(before + image * n * n + tile, mask=lower, other=0)
            twice = tl.where(j[None, :] < i[:, None], 2.0, 1.0) * value
            number = (image * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
            slot = moments + number * 4
            diagonal = tl.where(i[:, None] == j[None, :], value, 0)
            tl.store(slot, tl.sum(tl.sum(diagonal, 1).to(tl.float64), 0))
            tl.store(slot + 1, tl.sum(tl.sum(twice * value, 1).to(tl.float64), 0))
            tl.store(slot + 2, tl.sum(tl.sum(twice * current, 1).to(tl.float64), 0))
            tl.store(slot + 3, tl.sum(tl.sum(twice * earlier, 1).to(tl.float64), 0))
        out += image * n * n
        tl.store(out + tile, value, mask=lower)
        tl.store(out + j[None, :] * n + i[:, None], value, mask=lower)


def prepare(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows, scaled to stay in range, and the inverse of their lengths.

    Args:
        features: ``(B, N, D)`` float32, bfloat16 or float16.

    Returns:
        ``(B, N, D)`` of the same type, with each row scaled by a power of two and rows that are not finite set to
        zero (float16 is not scaled: its sums of products always fit into float32); and ``(B, N)`` float64, 0 for
        zero rows.
    """
    x = features.detach().contiguous()
    count, n, d = x.shape
    rows, inverse = torch.empty_like(x), x.new_empty((count, n), dtype=torch.float64)
    launch(_prepare, (count * n,), x, rows, inverse, d, RESCALE=x.dtype != torch.float16, BLOCK=1024)
    return rows, inverse


def cosines(features: Tensor) -> Tensor:
    """Return ``(B, N, N)`` float64 cosines of ``(B, N, D)`` tokens, by the rules of ``torch_ops.cosine_gram``.

    The diagonal is exactly 1, or 0 for zero rows.
    """
    rows, inverse = prepare(features)
    return _products_of(rows, inverse)


def scatter(features: Tensor) -> Tensor:
    """Return the ``(B, D, D)`` float64 inner products of the columns of the centered unit tokens.

    This matrix has the same non-zero eigenvalues as the tokens' own, and is smaller if N > D. The unit tokens are
    float32.
    """
    rows, inverse = prepare(features)
    unit = rows.float().mul_(inverse[..., None].float())
    unit -= unit.mean(dim=1, keepdim=True)
    return _products_of(unit.transpose(1, 2).contiguous(), None)


def _products_of(rows: Tensor, inverse: Tensor | None) -> Tensor:
    count, n, d = rows.shape
    gram = rows.new_empty((count, n, n), dtype=torch.float64)
    block = TILES[n > 1024]
    tiles = blocks(n, block)
    launch(
        _gram,
        (tiles, tiles, count),
        rows,
        gram if inverse is None else inverse,
        gram,
        n,
        d,
        COSINES=inverse is not None,
        WIDEN=INTERPRETED,
        BLOCK=block,
        CHUNK=CHUNK,
    )
    return gram


class TritonChain:
    """The products of ``entropy_chain``: half the arithmetic of a matrix product, with moments in the same pass.

    On tensor cores, each factor is split into TF32 parts (``tf32x3``), which is as accurate as float32, and sums
    of 32 columns are added in float32. torch's own products are not used: a global switch may round them to TF32.
    """

    def square(self, x: Tensor) -> Tensor:
        """Return ``x x``."""
        return self._launch(x, x, advance=False)[0]

    def advance(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``2 x - x x`` and its ``(B, 4)`` moments."""
        out, moments = self._launch(x, before, advance=True)
        return out, moments.sum(dim=1)

    def _launch(self, x: Tensor, before: Tensor, *, advance: bool) -> tuple[Tensor, Tensor]:
        count, n, _ = x.shape
        block = TILES[n > 1024]
        tiles = blocks(n, block)
        out, moments = torch.empty_like(x), x.new_zeros((count, tiles * tiles, 4), dtype=torch.float64)
        launch(
            _square,
            (tiles, tiles, count),
            x,
            before,
            out,
            moments,
            n,
            ADVANCE=advance,
            PRECISION=_precision(x.device),
            BLOCK=block,
            CHUNK=CHAIN_CHUNK,
        )
        return out, moments


def _precision(device: torch.device) -> str:
    """Return how float32 is multiplied: TF32 exists from compute capability 8 on."""
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32x3" if has_tf32 else "ieee"
