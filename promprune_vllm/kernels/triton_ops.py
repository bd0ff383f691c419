"""The CUDA path: Triton kernels, nothing that asks the host, the same work for every image of a size.

What is computed in which precision, and what that guarantees:

* Cosines are float64, right to 1e-8 ... 1e-6 (``triton_gram``). The greedy choice is made on them in float64 by
  the reference's rules, ties in steps of 2**-32 included. Repeated tokens have the same bits, so they tie exactly.
  The tokens kept are those of the float64 reference unless two costs are that close: an emulation of these sums
  kept the same tokens of 72 of 72 images (12 spectra, 576 tokens of bfloat16, K = 64).
* The entropy comes from those cosines, centred in float64, by products in float32 (``entropy_chain``): right to
  1e-5. Where a split of the budget is that close to a half it can differ by one token. ``exact`` takes the
  reference's eigenvalues instead; the solver makes the host wait.
* The same image on the same kind of GPU with the same versions gives the same tokens, whatever is computed beside
  it: only groups of one image share a launch, their tiles depend on shapes alone, no sum is taken in the order in
  which programs happen to finish, and up to ``DENSE`` tokens no matrix product is left to a library that chooses
  its own order.
* Nothing is copied to the host and nothing depends on a value there: everything can be captured in a CUDA graph.

What an image of very many tokens may take is bounded. Beyond ``DENSE`` tokens the choice makes no N x N matrix:
rows of cosines are taken one by one, by torch in float64, and memory is O(N (D + K)). The entropy's matrix has the
side ``min(N, D)``; where both exceed ``SIDE``, wider than any model today, it is that of ``SIDE`` tokens, evenly
spread over the image: another entropy, of a smaller set.

Features of float64 come from no model; they take the reference.
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
    """Return the ``(B,)`` entropies of images whose ``(B, N, N)`` cosines are at hand, N at most D."""
    mean = grams.mean(dim=2)
    offset = mean - mean.mean(dim=1, keepdim=True) / 2
    centred = (grams - offset[:, :, None]).sub_(offset[:, None, :])
    return entropy_chain.spectral_entropy(centred, triton_gram.TritonChain())


def sample(features: Tensor) -> Tensor:
    """Return at most ``SIDE`` tokens, evenly spread over those there are."""
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
    """Return ``(keep,)`` tokens: the reference, which does not ask the host either."""
    return torch_ops.max_min_select(gram, keep)


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return ``(P,)`` float32 as ``torch_ops.received_attention`` does."""
    if queries.dtype not in _TYPES:
        return torch_ops.received_attention(queries, keys, scale)
    return triton_attention.received_attention(queries, keys, scale)


def together(shape: torch.Size) -> int:
    """Return how many groups of ``(N, D)`` share a launch: together no more memory than one of ``DENSE``."""
    return max(1, (DENSE // shape[0]) ** 2)


class Cosines:
    """The cosines of B groups of one shape and type, as ``ops.Cosines``; one launch for all of them.

    Args:
        groups: ``(N, D)`` tokens each, of any floating type.
    """

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._groups = [group.detach() for group in groups]

    @cached_property
    def _grams(self) -> Tensor:
        if self._groups[0].dtype not in _TYPES:
            return torch.stack([torch_ops.cosine_gram(group) for group in self._groups])
        alone = len(self._groups) == 1
        return triton_gram.cosines(self._groups[0][None] if alone else torch.stack(self._groups))

    def matrices(self) -> list[Tensor]:
        """Return ``(N, N)`` float64 of each."""
        return list(self._grams)

    def entropies(self, *, exact: bool = False) -> list[Tensor]:
        """Return the 0-d float64 entropy of each."""
        n, d = self._groups[0].shape
        if exact:
            return [torch_ops.spectral_entropy(group) for group in self._groups]
        if 2 <= n <= min(d, DENSE) and self._groups[0].dtype in _TYPES:
            return list(entropies_of_grams(self._grams))
        return [spectral_entropy(group) for group in self._groups]

    def greedy_dpp(self, orders: Sequence[Tensor], given: Sequence[Tensor], keeps: Sequence[int]) -> list[Tensor]:
        """Return the tokens of each. All are chosen up to the largest of ``keeps``; the first stay the same."""
        if self._groups[0].shape[0] > DENSE:
            return [
                torch_greedy.greedy_dpp_by_rows(torch_ops.unit_rows(group), order, count, keep)
                for group, order, count, keep in zip(self._groups, orders, given, keeps, strict=True)
            ]
        picks = triton_greedy.greedy_dpp(
            self._grams, torch.stack(list(orders)), torch.stack(list(given)), max(keeps)
        )
        return [tokens[:keep] for tokens, keep in zip(picks, keeps, strict=True)]


def warm_up(device: torch.device) -> None:
    """Compile the kernels for tokens of 16 bits, for every size of block: at start-up, before any request."""
    for dtype in (torch.bfloat16, torch.float16):
        for n, d, keep in ((600, 1024, 64), (1040, 1024, 80), (2080, 1040, 80)):
            shared = Cosines([torch.ones((n, d), dtype=dtype, device=device)])
            shared.entropies()
            order = torch.arange(n, device=device)
            shared.greedy_dpp([order], [order[3]], [keep])
        patches = torch.ones((2, 64, 1, 80), dtype=dtype, device=device)
        received_attention(patches[0], patches[1], 1.0)
