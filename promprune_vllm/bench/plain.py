"""The procedure of arXiv 2603.14892 in straightforward float32 torch, as the baseline of our kernels.

Written for this comparison from the paper's description; it is not the authors' code, and nothing else uses it.
Two Grams, an eigenvalue solve, a top-k and a loop of K steps, each a few torch calls.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def centred_gram(features: Tensor) -> Tensor:
    """Return the ``(N, N)`` float32 inner products of the unit tokens minus their mean; ``(D, D)`` if D < N."""
    unit = features.float() / features.float().norm(dim=1, keepdim=True)
    unit = unit - unit.mean(dim=0)
    gram: Tensor = unit @ unit.T if unit.shape[0] <= unit.shape[1] else unit.T @ unit
    return gram


def entropy_of(gram: Tensor) -> Tensor:
    """Return the 0-d float32 spectral entropy, divided by the logarithm of the matrix's size."""
    values = torch.linalg.eigvalsh(gram).clamp_min(1e-12)
    p = values / values.sum()
    entropy: Tensor = -(p * p.log()).sum() / math.log(gram.shape[0])
    return entropy


def kernel(features: Tensor) -> Tensor:
    """Return the ``(N, N)`` float32 cosines."""
    unit = features.float() / features.float().norm(dim=1, keepdim=True)
    gram: Tensor = unit @ unit.T
    return gram


def split(entropy: Tensor, keep: int, mu: float, tau: float) -> int:
    """Return the number of tokens of the budget that go to saliency."""
    return int((keep * (1 - torch.sigmoid((entropy.double() - mu) / tau))).round())


def greedy(gram: Tensor, salient: Tensor, keep: int) -> Tensor:
    """Extend ``(s,)`` salient tokens to ``(keep,)`` by the fast greedy MAP of Chen et al., NeurIPS 2018."""
    n, new = gram.shape[0], keep - salient.shape[0]
    left = torch.ones(n, device=gram.device)
    left[salient] = -torch.inf
    first = gram[:, salient].amax(dim=1) if len(salient) else torch.zeros_like(left)
    pick = int(first.masked_fill(left < 0, torch.inf).argmin())
    factors, picks = gram.new_zeros(new, n), []
    for t in range(new):
        picks.append(pick)
        e = (gram[pick] - factors[:t, pick] @ factors[:t]) / left[pick].clamp_min(1e-10).sqrt()
        factors[t] = e
        left -= e * e
        left[pick] = -torch.inf
        pick = int(left.argmax())
    return torch.cat([salient, torch.tensor(picks, dtype=torch.int64, device=gram.device)])


def select(features: Tensor, saliency: Tensor, keep: int, mu: float, tau: float) -> Tensor:
    """Run the whole procedure and return ``(keep,)`` token indices, ascending."""
    salient = saliency.topk(split(entropy_of(centred_gram(features)), keep, mu, tau)).indices
    return greedy(kernel(features), salient, keep).sort().values


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the mean attention each of ``(P, H, d)`` patches receives in the full maps, ``(P,)`` float32."""
    total = torch.zeros(queries.shape[0], device=queries.device)
    for head in range(queries.shape[1]):
        scores = queries[:, head].float() @ keys[:, head].float().T * scale
        total += scores.softmax(dim=-1).mean(dim=0)
    return total / queries.shape[1]
