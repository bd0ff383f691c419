"""The CPU path: half the arithmetic for a Gram, float32 where it cannot decide anything, compiled loops.

What is summed in which precision:

* Matrices handed to methods are float64: their near-ties are as close as 1e-7.
* The spectral entropy comes from a float32 Gram, centred afterwards, and a float32 eigen-solve. Where that is not
  to be trusted (``LEAST_SPREAD``, ``FEWEST``, ``MOST_NEGATIVE``), it comes from the float64 reference.
* ``Cosines.greedy_dpp`` proposes tokens from the same float32 Gram, then takes the decision again in float64
  among the tokens that came close to one: see ``cpu_cosines``.

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
"""Mean squared distance of the unit tokens from their mean below which float32 is not trusted with the entropy.

Centring subtracts numbers near 1 then, each rounded to 6e-8: errors were 6e-7 at 0.005 and 1e-5 at 0.001. Also the
guard of tokens that do not differ at all.
"""
FEWEST = 128
"""Smaller spectra are taken in float64, which costs less than a millisecond there.

Two or three eigenvalues that should be 0 need not show as negative ones: see ``MOST_NEGATIVE``.
"""
MOST_NEGATIVE = 5e-7
"""Share of negative eigenvalues in the trace above which float32 is not trusted with the entropy.

True ones are never negative. Where the tokens' rank is below min(N, D), as of repeated tokens, hundreds are 0, and
rounding makes half of them negative and as much positive: errors were up to 5e-4.
"""
SCORES = 2**18
"""Scores of an attention map held at a time: 1 MiB of float32, which stays in a core's cache."""


def cosine_gram(features: Tensor) -> Tensor:
    """Return ``(N, N)`` float64 as ``torch_ops.cosine_gram`` does."""
    return cpu_gram.cosines(features, torch.float64)[0]


def single_is_exact() -> bool:
    """Whether products of float32 are float32: torch can be told to round them to fewer bits."""
    return torch.get_float32_matmul_precision() == "highest"


def spectral_entropy(features: Tensor) -> Tensor:
    """Return the 0-d float64 entropy as ``torch_ops.spectral_entropy`` does, to about 1e-6."""
    n, d = features.shape
    if min(n, d) < FEWEST or not single_is_exact():
        return torch_ops.spectral_entropy(features)
    single = cpu_gram.cosines(features, torch.float32)[0] if n <= d else None
    return entropy_of_gram(features, single)


def entropy_of_gram(features: Tensor, single: Tensor | None) -> Tensor:
    """Return the entropy of tokens whose Gram is at hand.

    Args:
        features: ``(N, D)``, both at least ``FEWEST``.
        single: ``(N, N)`` float32 cosines; not looked at where N > D.
    """
    n, d = features.shape
    with (
        nullcontext(cpu_gram.covariance(features))
        if n > d or single is None
        else cpu_gram.centred(single) as lower
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
    nothing = np.empty(0, np.int64)
    picks, *_ = cpu_loops.greedy_dpp(
        gram.detach().contiguous().numpy(),
        order.contiguous().numpy(),
        min(int(given), keep),
        keep,
        weights,
        nothing,
        0.0,
    )
    return torch.from_numpy(picks)


def max_min_select(gram: Tensor, keep: int) -> Tensor:
    """Return ``(keep,)`` tokens as ``torch_ops.max_min_select`` does."""
    from promprune_vllm.kernels import cpu_loops

    return torch.from_numpy(cpu_loops.max_min_select(gram.detach().double().contiguous().numpy(), keep))


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return ``(P,)`` float32 as ``torch_ops.received_attention`` does, a megabyte of the map at a time."""
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
    """Compile every loop for both precisions, so that no request waits for it (a second, or a cache's read)."""
    from promprune_vllm.kernels import cpu_loops

    order, nothing = np.arange(3), np.empty(0, np.int64)
    for dtype in (np.float32, np.float64):
        for weights in (np.empty(0), np.ones(3)):
            for given in (0, 1):
                cpu_loops.greedy_dpp(np.eye(3, dtype=dtype), order, given, 2, weights, nothing, 0.0)
        cpu_loops.mirror(np.eye(3, dtype=dtype), True)
    cpu_loops.centre(np.eye(3, dtype=np.float32))
    cpu_loops.max_min_select(np.eye(3), 2)
