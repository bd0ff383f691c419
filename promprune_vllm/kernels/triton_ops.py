"""The CUDA path: Triton kernels, no synchronization with the host, the same work for every image of one size.

The precision of each step, and what it guarantees:

* Cosines are float64, accurate to 1e-8 ... 1e-6 (``triton_gram``). The greedy choice is made on them in float64 by
  the reference's rules, including ties in steps of 2**-32. Repeated tokens have the same bits and tie exactly.
  The kept tokens are those of the float64 reference unless two costs are that close: an emulation of these sums
  kept the same tokens for 72 of 72 images (12 spectra, 576 tokens in bfloat16, K = 64).
* The entropy comes from those cosines, centered in float64, by products in float32 (``entropy_chain``): accurate
  to 1e-5. If a split of the budget is that close to a half, it can differ by one token. ``exact`` uses the
  reference's eigenvalues instead; that solver makes the host wait.
* The same image on the same type of GPU with the same versions gives the same tokens, whatever else is running:
  only groups of one image share a launch, their tiles depend only on shapes, no sum depends on the order in which
  programs finish, and up to ``DENSE`` tokens no matrix product is left to a library that chooses its own order.
* Nothing is copied to the host and nothing depends on a value there: everything can be captured in a CUDA graph.

Memory is bounded for images with very many tokens. Beyond ``DENSE`` tokens, the greedy choice builds no N x N
matrix: rows of cosines are computed one by one, by torch in float64, and memory is O(N (D + K)). The entropy's
matrix has the side ``min(N, D)``. If both exceed ``SIDE``, more than the width of any model today, the entropy is
that of ``SIDE`` tokens evenly spread over the image, which is a different value.

No model produces float64 features; they use the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from promprune_vllm.kernels import (
    entropy_chain,
    torch_greedy,
    torch_ops,
    triton_attention,
    triton_gram,
    triton_greedy,
)

DENSE, SIDE = triton_greedy.MOST_TOKENS, 8192
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def cosine_gram(features: Tensor) -> Tensor:
    """Return ``(N, N)`` float64 as ``torch_ops.cosine_gram`` does, to about 1e-6."""
    if features.dtype not in _TYPES:
        return torch_ops.cosine_gram(features)
    return triton_gram.cosines(features[None])[0]


def spectral_entropy(features: Tensor) -> Tensor:
    """Return the 0-d float64 entropy as ``torch_ops.spectral_entropy`` does, to about 1e-5."""
    n, d = features.shape
    if features.dtype not in _TYPES or min(n, d) < 2:
        return torch_ops.spectral_entropy(features)
    if n > d and d <= SIDE:
        return entropy_chain.spectral_entropy(triton_gram.scatter(features[None]), triton_gram.TritonChain())[0]
    return entropies_of_grams(cosine_gram(sample(features))[None])[0]


def entropies_of_grams(grams: Tensor) -> Tensor:
    """Return the ``(B,)`` entropies of images, given their ``(B, N, N)`` cosines; N is at most D."""
    mean = grams.mean(dim=2)
    offset = mean - mean.mean(dim=1, keepdim=True) / 2
    centered = (grams - offset[:, :, None]).sub_(offset[:, None, :])
    return entropy_chain.spectral_entropy(centered, triton_gram.TritonChain())


def sample(features: Tensor) -> Tensor:
    """Return at most ``SIDE`` tokens, evenly spread over all tokens."""
    n = features.shape[0]
    if n <= SIDE:
        return features
    return features.index_select(0, torch.arange(SIDE, device=features.device) * n // SIDE)


def greedy_dpp(gram: Tensor, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
    """Return ``(keep,)`` tokens as ``torch_greedy.greedy_dpp`` does."""
    if gram.shape[0] > DENSE:
        return torch_greedy.greedy_dpp(gram, order, given, keep, quality)
    weights = None if quality is None else quality.detach().double()[None]
    return triton_greedy.greedy_dpp(gram.detach().double()[None], order[None], given.reshape(1), keep, weights)[0]


def max_min_select(gram: Tensor, keep: int) -> Tensor:
    """Return ``(keep,)`` tokens by the reference, which does not synchronize with the host either."""
    return torch_ops.max_min_select(gram, keep)


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return ``(P,)`` float32 as ``torch_ops.received_attention`` does."""
    if queries.dtype not in _TYPES:
        return torch_ops.received_attention(queries, keys, scale)
    return triton_attention.received_attention(queries, keys, scale)


def most_per_launch(shape: torch.Size) -> int:
    """Return how many groups of ``(N, D)`` share a launch, in at most the memory of one group of ``DENSE``."""
    return max(1, (DENSE // shape[0]) ** 2)


class Cosines:
    """The cosines of B groups of one shape and dtype, like ``ops.Cosines``; one launch for all of them.

    Args:
        groups: ``(N, D)`` tokens of each group, of any floating type.
    """

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._groups = [group.detach() for group in groups]

    @cached_property
    def _grams(self) -> Tensor:
        if self._groups[0].dtype not in _TYPES:
            return torch.stack([torch_ops.cosine_gram(group) for group in self._groups])
        single = len(self._groups) == 1
        return triton_gram.cosines(self._groups[0][None] if single else torch.stack(self._groups))

    def matrices(self) -> list[Tensor]:
        """Return the ``(N, N)`` float64 cosines of each group."""
        return list(self._grams)

    def entropies(self, *, exact: bool = False) -> list[Tensor]:
        """Return the 0-d float64 entropy of each group."""
        n, d = self._groups[0].shape
        if exact:
            return [torch_ops.spectral_entropy(group) for group in self._groups]
        if 2 <= n <= min(d, DENSE) and self._groups[0].dtype in _TYPES:
            return list(entropies_of_grams(self._grams))
        return [spectral_entropy(group) for group in self._groups]

    def greedy_dpp(
        self,
        orders: Sequence[Tensor],
        given: Sequence[Tensor],
        keeps: Sequence[int],
        qualities: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the tokens of each group: the first ``keep`` of as many choices as the largest of ``keeps``."""
        if self._groups[0].shape[0] > DENSE:
            weighted: Sequence[Tensor | None] = qualities or [None] * len(keeps)
            return [
                torch_greedy.greedy_dpp_by_rows(torch_ops.unit_rows(group), order, count, keep, quality)
                for group, order, count, keep, quality in zip(
                    self._groups, orders, given, keeps, weighted, strict=True
                )
            ]
        weights = None if qualities is None else torch.stack([each.detach().double() for each in qualities])
        picks = triton_greedy.greedy_dpp(
            self._grams, torch.stack(list(orders)), torch.stack(list(given)), max(keeps), weights
        )
        return [tokens[:keep] for tokens, keep in zip(picks, keeps, strict=True)]


def warm_up(device: torch.device) -> None:
    """Compile the kernels for 16-bit tokens, for every block size: at start-up, before any request."""
    for dtype in (torch.bfloat16, torch.float16):
        for n, d, keep in ((600, 1024, 64), (1040, 1024, 80), (2080, 1040, 80)):
            cosines = Cosines([torch.ones((n, d), dtype=dtype, device=device)])
            cosines.entropies()
            order = torch.arange(n, device=device)
            cosines.greedy_dpp([order], [order[3]], [keep])
        patches = torch.ones((2, 64, 1, 80), dtype=dtype, device=device)
        received_attention(patches[0], patches[1], 1.0)
