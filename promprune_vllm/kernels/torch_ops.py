"""Plain torch reference of every operation: correctness first. Faster paths are tested against it.

Everything is computed in float64, whatever the input: near-ties of the greedy choice are as close as 1e-7,
where float32 sums already depend on the order of the features' columns. Nothing is copied to the host, so the
same code runs on a CPU and, without stalling it, on a GPU; only the solver of eigenvalues makes the host wait.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ATTENTION_SCORES = 2**22
"""Scores of an attention map computed at a time, in float32: 16 MiB."""


def cosine_gram(features: Tensor) -> Tensor:
    """Return the cosine of every pair of tokens.

    Args:
        features: ``(N, D)`` tokens of any floating type.

    Returns:
        ``(N, N)`` float64. Zero rows and rows that are not finite have cosine 0 with everything.
    """
    x = unit_rows(features)
    return x @ x.T


def cross_cosine(features: Tensor, others: Tensor) -> Tensor:
    """Return the cosine of every token with every row of another set, ``(N, M)`` float64; see ``cosine_gram``."""
    return unit_rows(features) @ unit_rows(others).T


def quantized(values: Tensor) -> Tensor:
    """Return cosines or distances in whole steps of 2**-32, float64, so that equal ones compare equal.

    The last bits of a float64 sum depend on the order of the columns and on the tiling of the matrix product. A
    step is far above that, and far below any meaningful difference.
    """
    steps: Tensor = (values.double() * 2.0**32).round()
    return steps


def max_min_select(gram: Tensor, keep: int) -> Tensor:
    """Choose tokens one by one, each as far as possible from the nearest one chosen before.

    The distance is ``1 - cosine``. The first token is the one farthest from its own nearest neighbor. Ties go to
    the lowest index, even if every distance left is 0; a token is chosen at most once.

    Args:
        gram: ``(N, N)`` cosines.
        keep: Size of the set, ``1 <= keep < N``.

    Returns:
        ``(keep,)`` int64, in the order they were chosen.
    """
    n = gram.shape[0]
    distance = quantized(1 - gram)
    itself = torch.eye(n, dtype=torch.bool, device=gram.device)
    isolation = distance.masked_fill(itself, torch.inf).amin(dim=0)  # (N,) to the nearest other token
    closest = torch.full_like(isolation, torch.inf)  # (N,) to the nearest chosen token; -inf for the chosen ones
    picks = torch.empty(keep, dtype=torch.int64, device=gram.device)
    for t in range(keep):
        pick = (isolation if t == 0 else closest).argmax(dim=0, keepdim=True)  # (1,) ties: the lowest index
        picks[t : t + 1] = pick
        closest = torch.minimum(closest, distance.index_select(0, pick).squeeze(0))
        closest.index_fill_(0, pick, -torch.inf)
    return picks


def complement(chosen: Tensor, total: int) -> Tensor:
    """Return the tokens not among the K distinct chosen ones, ``(total - K,)`` int64 in raster order."""
    is_chosen = torch.zeros(total, dtype=torch.int8, device=chosen.device).index_fill_(0, chosen, 1)
    return torch.argsort(is_chosen, stable=True)[: total - chosen.shape[0]]


def finite_rows(features: Tensor) -> Tensor:
    """Return ``(N, D)`` float64, where rows with NaN or infinity are replaced by zero rows."""
    return features.masked_fill(~features.isfinite().all(dim=1, keepdim=True), 0).double()


def spectral_entropy(features: Tensor) -> Tensor:
    """Return the normalized spectral entropy of a set of tokens.

    ``S = -sum p ln p`` over the eigenvalues of the covariance of the unit-length, centered tokens, divided by
    ``ln min(N, D)``: 0 if the tokens lie on one line, 1 if they spread evenly in every direction.

    Args:
        features: ``(N, D)`` tokens of any floating type.

    Returns:
        0-d float64 in [0, 1]. Identical tokens (trace below 1e-9) have no spectrum; their entropy is defined as
        1, which leads to covering tokens.
    """
    n, d = features.shape
    if min(n, d) < 2:
        return features.new_ones((), dtype=torch.float64)
    x = unit_rows(features)
    x = x - x.mean(dim=0)
    gram = x @ x.T if n <= d else x.T @ x  # the smaller of the two has the same non-zero eigenvalues
    flat = ~(gram.diagonal().sum() >= 1e-9)
    # Replace a flat spectrum before the solver runs: eigvalsh may not converge on pure rounding noise.
    solvable = torch.where(flat, torch.eye(min(n, d), dtype=gram.dtype, device=gram.device), gram)
    eigenvalues = torch.linalg.eigvalsh(solvable).clamp_min(1e-12)
    p = eigenvalues / eigenvalues.sum()
    entropy = -(p * p.log()).sum() / math.log(min(n, d))
    return torch.where(flat, torch.ones_like(entropy), entropy)


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return how much attention each patch receives from all patches of its image.

    ``c[j] = mean over heads h and queries i of softmax_j(scale * q_hi . k_hj)``: the column mean of the attention
    map, which is never in memory as a whole. Memory is O(P): a few rows of the map at a time.

    Args:
        queries: ``(P, H, d)`` queries of one image, after rotary embedding.
        keys: ``(P, H, d)`` keys, likewise.
        scale: Factor of the scores, ``d ** -0.5`` in every tower here.

    Returns:
        ``(P,)`` float32, summing to 1.
    """
    patches, heads, _ = queries.shape
    k = keys.float().permute(1, 2, 0)  # (H, d, P)
    total = torch.zeros(patches, dtype=torch.float64, device=queries.device)
    rows = max(1, ATTENTION_SCORES // (heads * patches))
    for chunk in torch.split(queries, rows):
        scores = torch.matmul(chunk.float().transpose(0, 1) * scale, k)  # (H, rows, P)
        total += scores.softmax(dim=-1).sum(dim=(0, 1))
    mean: Tensor = (total / (heads * patches)).float()
    return mean


def share_entropy(weights: Tensor) -> Tensor:
    """Return the normalized entropy of weights, taken as shares of their sum.

    Args:
        weights: ``(N,)`` of any floating type. Weights that are negative or not finite count as 0.

    Returns:
        0-d float64 in [0, 1]: 0 if one token has all the weight, 1 if all have the same, or if the weights sum
        to 0.
    """
    n = weights.shape[0]
    if n < 2:
        return weights.new_ones((), dtype=torch.float64)
    w = weights.double()
    w = torch.where(w.isfinite(), w, torch.zeros_like(w)).clamp_min(0)
    total = w.sum()
    entropy = torch.special.entr(w / torch.where(total > 0, total, 1)).sum() / math.log(n)
    return torch.where(total > 0, entropy, torch.ones_like(entropy))


def descending_order(scores: Tensor) -> Tensor:
    """Return the tokens from highest to lowest score, ``(N,)`` int64. Ties: lowest index first; NaN last."""
    comparable = torch.where(scores.isnan(), -torch.inf, scores.double())
    return torch.argsort(comparable, descending=True, stable=True)


def min_max(scores: Tensor) -> Tensor:
    """Return scores scaled to [0, 1], ``(N,)`` float64.

    Scores that do not differ by more than 1e-12 of the largest all become 1, so that as a factor or a weight
    they have no influence. NaN and -inf give 0, +inf gives 1.
    """
    x = torch.where(scores.isnan(), -torch.inf, scores.double())
    finite = x.isfinite()
    low = x.masked_fill(~finite, torch.inf).amin()
    high = x.masked_fill(~finite, -torch.inf).amax()
    flat = ~(high - low > 1e-12 * torch.maximum(high.abs(), low.abs()))
    scaled = ((x - low) / torch.where(flat, 1, high - low)).clamp(0, 1)
    return torch.where(flat, (x > -torch.inf).double(), scaled)


def merge_rows(features: Tensor, indices: Tensor, into: Tensor, weights: Tensor) -> Tensor:
    """Return the kept rows, each a weighted mean with the rows merged into it.

    Args:
        features: ``(N, D)``. Rows that are not finite are merged as zero rows.
        indices: ``(K,)`` int64, the kept tokens.
        into: ``(N,)`` int64: the kept token each token is merged into; -1 for none, and for kept tokens.
        weights: ``(N,)`` at least 0.

    Returns:
        ``(K, D)`` in the type of the features. A kept token with nothing merged into it keeps its exact row.
    """
    weights = weights.double()
    share = (into[None, :] == indices[:, None]) * weights[None, :]  # (K, N)
    merged = share.sum(dim=1, keepdim=True)
    own = weights[indices][:, None]
    x = finite_rows(features)
    mean = (own * x[indices] + share @ x) / (own + merged).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(merged > 0, mean.to(features.dtype), features[indices])


def token_keys(features: Tensor, seed: int) -> Tensor:
    """Return pseudo-random integers, one per token, that depend on the content of the whole image.

    Integer arithmetic only, so the same image gives the same keys on every device and in every batch.

    Args:
        features: ``(N, D)``.
        seed: Any integer.

    Returns:
        ``(N,)`` int64 sort keys.
    """
    bits = features.float().contiguous().view(torch.int32).to(torch.int64)
    n, d = bits.shape
    column = _mix(torch.arange(d, device=bits.device) + 1)
    row = _mix(torch.arange(n, device=bits.device) + d + 1)
    image = ((bits * (column | 1)[None, :]).sum(dim=1) * (row | 1)).sum()  # wraps around, in any order
    return _mix(row ^ _mix(image + seed % 2**62))


def unit_rows(features: Tensor) -> Tensor:
    """Return ``(N, D)`` float64 rows of length 1; rows that are zero or not finite become zero."""
    x = features.double()
    norm = x.norm(dim=1, keepdim=True)
    unit: Tensor = x / norm
    return unit.masked_fill_(~((norm > 0) & norm.isfinite()), 0)


def _mix(x: Tensor) -> Tensor:
    """Spread the bits of int64 values: three rounds of xor-shift and multiplication."""
    for multiplier in (-49064778989728563, -4265267296055464877, -7046029254386353131):
        x = (x ^ ((x >> 31) & 0x1FFFFFFFF)) * multiplier
    return x ^ ((x >> 29) & 0x7FFFFFFFF)
