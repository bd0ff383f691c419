"""Cosines on a CPU: one triangle of the product, in pieces that stay in its caches, in either precision.

The raw products are computed first and divided by the lengths afterwards, so the features are never copied as a
whole. Memory besides the result: at most 512 columns of the features, fewer if only some rows are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

COLUMNS = 512
"""Columns multiplied at a time, half as many in float64. Only a change of dtype or a subset of rows is copied."""
GATHERED = 2**17
"""Entries gathered at a time for a subset of rows, 1 MiB in float64. Fewer rows, more columns: small products are
slow."""
_STRIPS = 6  # of rows; with more, smaller products cost more than the arithmetic saved (at N = 576 and 1296)
# Limits of a row's squared length: beyond them, or if it is not finite, rows are scaled before the product.
_LENGTHS = {torch.float32: (2.0**-80, 2.0**80), torch.float64: (2.0**-800, 2.0**800)}


def cosines(features: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the cosine of every pair of tokens.

    Args:
        features: ``(N, D)`` tokens of any floating type.
        dtype: float32 or float64, in which products are summed.
        rows: ``(M,)`` int64 indices: only these tokens, and the cosines are ``(M, M)``.

    Returns:
        ``(N, N)`` cosines, exactly symmetric, with a diagonal of exactly 1; zero for rows that are zero or not
        finite. And the ``(N, D)`` features, scaled row by row if they were out of range.
    """
    features = features.detach()
    gram = _products(features, dtype, rows)
    low, high = _LENGTHS[dtype]
    if not bool(((gram.diagonal() >= low) & (gram.diagonal() <= high)).all()):
        features = _scale(features)
        gram = _products(features, dtype, rows)
    squares = gram.diagonal().clone()
    inverse = torch.where(squares > 0, squares, torch.inf).rsqrt()
    gram.mul_(inverse[:, None]).mul_(inverse[None, :])
    gram.diagonal().copy_(squares > 0)
    return _mirror(gram), features


@contextlib.contextmanager
def centered(gram: Tensor) -> Iterator[Tensor]:
    """Center ``(N, N)`` float32 cosines in place while this context is open: inner products less the mean token.

    Only the diagonal and the lower triangle are centered. The upper triangle keeps the cosines, from which the
    lower one is restored on exit. So the eigen-solver's own copy is the only second matrix.
    """
    from promprune_vllm.kernels import cpu_loops

    diagonal = gram.diagonal().clone()
    cpu_loops.center(gram.numpy())
    try:
        yield gram
    finally:
        gram.diagonal().copy_(diagonal)
        cpu_loops.mirror(gram.numpy(), True)


def covariance(features: Tensor) -> Tensor:
    """Return the ``(D, D)`` float32 scatter of the centered unit tokens: smaller than the Gram if N > D."""
    features = features.detach()
    n, d = features.shape
    norm = torch.cat([rows.float().norm(dim=1) for rows in torch.split(features, COLUMNS)])
    low, high = _LENGTHS[torch.float32]
    if not bool(((norm >= low**0.5) & (norm <= high**0.5)).all()):
        features = _scale(features)
        norm = features.norm(dim=1).float()
    inverse = torch.where(norm > 0, norm, torch.inf).reciprocal()[:, None]
    total = torch.zeros(d, dtype=torch.float64)

    def pieces() -> Iterator[Tensor]:
        for rows, factors in zip(torch.split(features, COLUMNS), torch.split(inverse, COLUMNS), strict=True):
            unit = rows.float() * factors
            total.add_(unit.sum(dim=0, dtype=torch.float64))
            yield unit.T

    scatter = _mirror(_lower_gram(pieces(), d, torch.float32))
    mean = (total / n**0.5).float()
    return scatter.addr_(mean, mean, alpha=-1)


def _products(features: Tensor, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    if rows is None:
        width = COLUMNS * 4 // dtype.itemsize
        pieces = (piece.to(dtype) for piece in torch.split(features, width, dim=1))
        return _lower_gram(pieces, features.shape[0], dtype)
    width = max(COLUMNS // 4, GATHERED // rows.shape[0])
    pieces = (piece.index_select(0, rows).to(dtype) for piece in torch.split(features, width, dim=1))
    return _lower_gram(pieces, rows.shape[0], dtype)


def _lower_gram(pieces: Iterator[Tensor], n: int, dtype: torch.dtype) -> Tensor:
    """Sum ``a a^T`` over ``(n, any)`` pieces ``a``, in and below the diagonal strips; the rest is undefined."""
    gram = torch.empty(n, n, dtype=dtype)
    for number, a in enumerate(pieces):
        for top, bottom in pairwise(_edges(n)):
            out = gram[top:bottom, :bottom]
            torch.addmm(out, a[top:bottom], a[:bottom].T, beta=0 if number == 0 else 1, out=out)
    return gram


def _mirror(gram: Tensor) -> Tensor:
    """Copy the lower triangle to the upper one, in place: symmetric to the last bit."""
    from promprune_vllm.kernels import cpu_loops

    cpu_loops.mirror(gram.numpy(), False)
    return gram


def _edges(n: int) -> list[int]:
    strips = max(1, min(_STRIPS, n // 64))
    return [n * i // strips for i in range(strips + 1)]


def _scale(features: Tensor) -> Tensor:
    """Return rows scaled by powers of two to a length of about 1; zero for rows that are zero or not finite."""
    x = features.double()
    norm = x.norm(dim=1, keepdim=True)
    _, exponent = torch.frexp(norm)
    usable = (norm > 0) & norm.isfinite()
    half = -exponent // 2  # two factors, because a single one can overflow float64
    x = x * torch.pow(2.0, half.double()) * torch.pow(2.0, (-exponent - half).double())
    return x.masked_fill_(~usable, 0)
