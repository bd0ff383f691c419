"""The CPU path: half the arithmetic for a Gram, float32 wherever it cannot change a choice, compiled loops.

The precision of each sum:

* Matrices returned to methods are float64: near-ties in them are as close as 1e-7.
* The spectral entropy comes from a float32 Gram, centered afterwards, and a float32 eigen-solve. If that is not
  accurate enough (``LEAST_SPREAD``, ``FEWEST``, ``MOST_NEGATIVE``), it comes from the float64 reference.
* ``Cosines.greedy_dpp`` proposes tokens from the same float32 Gram, then decides in float64 among the tokens that
  came close: see ``cpu_cosines``.

The matrix products and the eigen-solve use torch's threads; the compiled loops use one.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from promprune_vllm.kernels import cpu_gram, torch_ops

LEAST_SPREAD = 0.005
"""Mean squared distance of the unit tokens from their mean below which the entropy is not computed in float32.

Below it, centering subtracts numbers near 1, each rounded to 6e-8: errors were 6e-7 at 0.005 and 1e-5 at 0.001.
This also catches identical tokens.
"""
FEWEST = 128
"""Smaller spectra are computed in float64, which takes less than a millisecond for them.

The check by ``MOST_NEGATIVE`` can miss two or three eigenvalues that should be 0: they need not become negative.
"""
MOST_NEGATIVE = 5e-7
"""Share of negative eigenvalues in the trace above which the float32 entropy is not used.

True eigenvalues are never negative. If the tokens' rank is below min(N, D), as with repeated tokens, hundreds are
0; rounding makes half of them negative and the other half positive: errors were up to 5e-4.
"""
SCORES = 2**18
"""Scores of an attention map computed at a time: 1 MiB of float32, which stays in a core's cache."""


def cosine_gram(features: Tensor) -> Tensor:
    """Return ``(N, N)`` float64 as ``torch_ops.cosine_gram`` does."""
    return cpu_gram.cosines(features, torch.float64)[0]


def single_is_exact() -> bool:
    """Return whether float32 products have full precision: torch can be set to round them to fewer bits."""
    return torch.get_float32_matmul_precision() == "highest"


def spectral_entropy(features: Tensor) -> Tensor:
    """Return the 0-d float64 entropy as ``torch_ops.spectral_entropy`` does, to about 1e-6."""
    n, d = features.shape
    if min(n, d) < FEWEST or not single_is_exact():
        return torch_ops.spectral_entropy(features)
    single = cpu_gram.cosines(features, torch.float32)[0] if n <= d else None
    return entropy_of_gram(features, single)


def entropy_of_gram(features: Tensor, single: Tensor | None) -> Tensor:
    """Return the entropy of tokens, given their Gram.

    Args:
        features: ``(N, D)``, both at least ``FEWEST``.
        single: ``(N, N)`` float32 cosines; not used if N > D.
    """
    n, d = features.shape
    with (
        nullcontext(cpu_gram.covariance(features))
        if n > d or single is None
        else cpu_gram.centered(single) as lower
    ):
        if not float(lower.diagonal().sum(dtype=torch.float64)) >= LEAST_SPREAD * n:
            return torch_ops.spectral_entropy(features)
        eigenvalues = torch.linalg.eigvalsh(lower).double()  # reads nothing above the diagonal
    if float(eigenvalues.clamp_max(0).sum().neg()) > MOST_NEGATIVE * float(eigenvalues.sum()):
        return torch_ops.spectral_entropy(features)
    p = eigenvalues.clamp_min(1e-12)
    p = p / p.sum()
    entropy: Tensor = -(p * p.log()).sum() / math.log(min(n, d))
    return entropy


def greedy_dpp(gram: Tensor, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
    """Return ``(keep,)`` tokens as ``torch_greedy.greedy_dpp`` does."""
    from promprune_vllm.kernels import cpu_loops

    weights = np.empty(0) if quality is None else quality.detach().double().contiguous().numpy()
    no_prefix = np.empty(0, np.int64)
    picks, *_ = cpu_loops.greedy_dpp(
        gram.detach().contiguous().numpy(),
        order.contiguous().numpy(),
        min(int(given), keep),
        keep,
        weights,
        no_prefix,
        0.0,
    )
    return torch.from_numpy(picks)


def max_min_select(gram: Tensor, keep: int) -> Tensor:
    """Return ``(keep,)`` tokens as ``torch_ops.max_min_select`` does."""
    from promprune_vllm.kernels import cpu_loops

    return torch.from_numpy(cpu_loops.max_min_select(gram.detach().double().contiguous().numpy(), keep))


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return ``(P,)`` float32 as ``torch_ops.received_attention`` does, one megabyte of the map at a time."""
    patches, heads, _ = queries.shape
    queries, keys = queries.detach(), keys.detach()
    total = torch.zeros(patches, dtype=torch.float64)
    rows = max(1, min(patches, SCORES // patches))
    scores = torch.empty(rows, patches)
    for head in range(heads):
        q = queries[:, head].float() * scale
        k = keys[:, head].float().T  # (d, P)
        for chunk in torch.split(q, rows):
            part = torch.mm(chunk, k, out=scores[: chunk.shape[0]])
            torch.softmax(part, dim=-1, out=part)
            total += part.sum(dim=0)
    mean: Tensor = (total / (heads * patches)).float()
    return mean


def warm_up(device: torch.device | None = None) -> None:  # noqa: ARG001  # there is one
    """Compile every loop for both precisions, so that no request has to wait (a second, or a read from cache)."""
    from promprune_vllm.kernels import cpu_loops

    order, no_prefix = np.arange(3), np.empty(0, np.int64)
    for dtype in (np.float32, np.float64):
        for weights in (np.empty(0), np.ones(3)):
            for given in (0, 1):
                cpu_loops.greedy_dpp(np.eye(3, dtype=dtype), order, given, 2, weights, no_prefix, 0.0)
        cpu_loops.mirror(np.eye(3, dtype=dtype), True)
    cpu_loops.center(np.eye(3, dtype=np.float32))
    cpu_loops.max_min_select(np.eye(3), 2)
