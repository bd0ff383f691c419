"""Plain torch reference of every operation: correct first, and the oracle of every faster path.

Everything is computed in float64, whatever the input: near-ties of the greedy choice are as close as 1e-7,
where float32 sums already depend on the order of the features' columns. Nothing is copied to the host, so the
same code runs on a CPU and, without stalling it, on a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXHAUSTED = 1e-5
"""Residual volume (squared distance, in units of the token's norm) below which a token adds nothing."""


def cosine_gram(features: Tensor) -> Tensor:
    """Cosine of every pair of tokens.

    Args:
        features: ``(N, D)`` tokens of any floating type.

    Returns:
        ``(N, N)`` float64. A zero row has cosine 0 with everything.
    """
    x = _unit_rows(features)
    return x @ x.T


def spectral_entropy(features: Tensor) -> Tensor:
    """Normalised spectral entropy of a set of tokens.

    ``S = -sum p ln p`` over the eigenvalues of the covariance of the unit-length, centred tokens, divided by
    ``ln min(N, D)``: 0 when the tokens lie on one line, 1 when they spread over every direction evenly.

    Args:
        features: ``(N, D)`` tokens of any floating type.

    Returns:
        0-d float64 in [0, 1]. Tokens that do not differ at all (trace below 1e-9) have no spectrum; they are
        given 1, which asks for covering tokens.
    """
    n, d = features.shape
    if min(n, d) < 2:
        return features.new_ones((), dtype=torch.float64)
    x = _unit_rows(features)
    x = x - x.mean(dim=0)
    gram = x @ x.T if n <= d else x.T @ x  # the smaller of the two has the same non-zero eigenvalues
    flat = ~(gram.diagonal().sum() >= 1e-9)
    # A flat spectrum is replaced before the solver sees it: eigvalsh need not converge on pure rounding noise.
    solvable = torch.where(flat, torch.eye(min(n, d), dtype=gram.dtype, device=gram.device), gram)
    eigenvalues = torch.linalg.eigvalsh(solvable).clamp_min(1e-12)
    p = eigenvalues / eigenvalues.sum()
    entropy = -(p * p.log()).sum() / math.log(min(n, d))
    return torch.where(flat, torch.ones_like(entropy), entropy)


def greedy_dpp(gram: Tensor, order: Tensor, given: Tensor, keep: int) -> Tensor:
    """Extend a given set by greedy MAP inference of a determinantal point process over the rest.

    Well-conditioned form of the fast greedy algorithm (Chen et al., NeurIPS 2018): the diagonal is taken as
    exactly 1 and the explained part of each token, ``acc = sum e**2``, is accumulated from exactly 0, so that
    no choice is decided by the rounding of ``1 - 1``. The next token is the least explained one; equal ones
    go to the lowest index; a chosen one never returns. Once nothing is left to explain (``1 - acc`` at most
    1e-5) the remaining places go down ``order``.

    Args:
        gram: ``(N, N)`` cosines.
        order: ``(N,)`` int64, tokens by descending saliency.
        given: 0-d int64, on the device: the first ``given`` tokens of ``order`` are already in the set. They
            exclude themselves, and the first new token is the one least similar to them; the determinant is
            not conditioned on them.
        keep: Size of the set, ``1 <= keep < N``.

    Returns:
        ``(keep,)`` int64: the given tokens in order, then the new ones as they were picked.
    """
    n = gram.shape[0]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(n, device=order.device)
    is_given = rank < given  # (N,)
    nearest = gram.masked_fill(~is_given[None, :], -torch.inf).amax(dim=1)  # (N,) -inf where nothing is given
    open_ = torch.ones(n, dtype=torch.bool, device=gram.device)
    acc = gram.new_zeros(n)
    factors = gram.new_zeros(keep, n)  # row t: the component of every token along the t-th new direction
    picks = order.new_empty(keep)
    for t in range(keep):
        blocked = ~(open_ & ~is_given)
        least = torch.where(given == t, nearest, acc).masked_fill(blocked, torch.inf).argmin()
        exhausted = (acc[least] >= 1 - EXHAUSTED) & (given != t)
        next_salient = rank.masked_fill(~open_, n).argmin()
        pick = torch.where((t < given) | exhausted, next_salient, least)
        picks[t] = pick
        open_[pick] = False
        residual = gram[pick] - factors[:t, pick] @ factors[:t]
        e = residual / (1 - acc[pick]).clamp_min(EXHAUSTED).sqrt()
        e = torch.where((t < given) | exhausted, torch.zeros_like(e), e)
        factors[t] = e
        acc = acc + e * e
    return picks


def token_keys(features: Tensor, seed: int) -> Tensor:
    """Pseudo-random integers, one per token, that depend on the content of the whole image.

    Integer arithmetic only, so the same image gives the same keys on every device and in every batch.

    Args:
        features: ``(N, D)``.
        seed: Any integer.

    Returns:
        ``(N,)`` int64, to be ranked.
    """
    bits = features.float().contiguous().view(torch.int32).to(torch.int64)
    n, d = bits.shape
    column = _mix(torch.arange(d, device=bits.device) + 1)
    row = _mix(torch.arange(n, device=bits.device) + d + 1)
    image = ((bits * (column | 1)[None, :]).sum(dim=1) * (row | 1)).sum()  # wraps around, in any order
    return _mix(row ^ _mix(image + seed % 2**62))


def _unit_rows(features: Tensor) -> Tensor:
    """Return ``(N, D)`` float64 rows of length 1; a zero row stays zero."""
    x = features.double()
    unit: Tensor = x / x.norm(dim=1, keepdim=True).clamp_min(1e-8)
    return unit


def _mix(x: Tensor) -> Tensor:
    """Spread the bits of int64 values: three rounds of xor-shift and multiplication."""
    for multiplier in (-49064778989728563, -4265267296055464877, -7046029254386353131):
        x = (x ^ ((x >> 31) & 0x1FFFFFFFF)) * multiplier
    return x ^ ((x >> 29) & 0x7FFFFFFFF)
