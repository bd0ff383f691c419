"""The cosines of one group of tokens, for methods that use them more than once: plain torch reference."""

from __future__ import annotations

from torch import Tensor

from promprune_vllm.kernels.torch_greedy import greedy_dpp
from promprune_vllm.kernels.torch_ops import cosine_gram, spectral_entropy


class Cosines:
    """Cosines by the reference operations, in float64; every call computes them again.

    Args:
        features: ``(N, D)`` tokens of any floating type.
    """

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def matrix(self) -> Tensor:
        """Return the ``(N, N)`` float64 cosines; see ``torch_ops.cosine_gram``."""
        return cosine_gram(self._features)

    def entropy(self, *, exact: bool = False) -> Tensor:  # noqa: ARG002  # always exact
        """Return the 0-d float64 entropy; see ``torch_ops.spectral_entropy``."""
        return spectral_entropy(self._features)

    def greedy_dpp(self, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
        """Return the ``(keep,)`` tokens; see ``torch_greedy.greedy_dpp``."""
        return greedy_dpp(self.matrix(), order, given, keep, quality)
