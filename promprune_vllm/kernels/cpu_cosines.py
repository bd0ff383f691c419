"""One float32 Gram for the entropy and the DPP of a group, with every choice of the DPP taken in float64.

Summed in float32, costs of tokens are wrong by about 1e-7, and the next choice is often as close as that. But few
tokens come close to a choice at all:

1. Propose: run the greedy loop on the float32 Gram, marking the tokens within ``MARGIN`` of each choice.
2. Decide: take the float64 cosines of the marked tokens, a few more than K, and run the loop on them alone. A
   token that was never close cannot have been chosen, so the outcome is that of the whole float64 matrix.
3. Where the two first differ, the proposal is repeated from the choice that was decided.

The rounding error is not bounded in advance but measured: over the choices, costs in float32 may differ from
those in float64 by an eighth of the margin. Where they differ by more, where hardly anything is left to explain
(the order then fills up, by a threshold), or where proposals do not settle, the whole matrix is taken in float64.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from promprune_vllm.kernels import cpu_gram, cpu_ops, torch_ops

MARGIN = 2e-5
"""Costs closer than this are decided in float64. Proposals were off by at most 1.6e-6, over 23 spectra."""
SAFETY = 8
"""How many times the measured error fits into the margin."""
PROPOSALS = 4
DEEPEST = 0.999
"""Explained volume of a choice beyond which the float64 matrix is taken: exhaustion is at 1 - 1e-5."""


class Cosines:
    """The cosines of one group of tokens, as ``torch_cosines.Cosines``.

    Args:
        features: ``(N, D)`` tokens of any floating type.
    """

    def __init__(self, features: Tensor) -> None:
        self._features = features

    @cached_property
    def single(self) -> tuple[Tensor, Tensor]:
        """Return ``(N, N)`` float32 cosines, and features whose rows are in range."""
        return cpu_gram.cosines(self._features, torch.float32)

    def matrix(self) -> Tensor:
        """Return ``(N, N)`` float64."""
        return cpu_ops.cosine_gram(self._features)

    def entropy(self, *, exact: bool = False) -> Tensor:
        """Return the 0-d float64 entropy."""
        n, d = self._features.shape
        if exact:
            return torch_ops.spectral_entropy(self._features)
        if not (cpu_ops.FEWEST <= n <= d and cpu_ops.single_is_exact()):
            return cpu_ops.spectral_entropy(self._features)
        return cpu_ops.entropy_of_gram(self._features, self.single[0])

    def greedy_dpp(self, order: Tensor, given: Tensor, keep: int) -> Tensor:
        """Return the ``(keep,)`` tokens."""
        salient = int(given)
        if salient >= keep:
            return order[:keep].clone()
        picks = self._proposed(order, salient, keep) if cpu_ops.single_is_exact() else None
        return cpu_ops.greedy_dpp(self.matrix(), order, given, keep) if picks is None else picks

    def _proposed(self, order: Tensor, given: int, keep: int) -> Tensor | None:
        """Propose in float32 and decide in float64; ``None`` where that would not be sound."""
        from promprune_vllm.kernels import cpu_loops

        gram, features = self.single
        ranked = order.contiguous().numpy()
        known, everything = np.empty(0, np.int64), np.empty(0)
        marked = np.zeros(gram.shape[0], np.bool_)
        marked[ranked[:given]] = True
        for _ in range(PROPOSALS):
            proposed, rough, near, deepest = cpu_loops.greedy_dpp(
                gram.numpy(), ranked, given, keep, everything, known, MARGIN
            )
            marked |= near
            marked[proposed] = True
            if deepest > DEEPEST or not np.isfinite(rough).all():
                return None
            tokens = np.flatnonzero(marked)  # ascending, so that the lowest of equal tokens stays the lowest
            exact = cpu_gram.cosines(features, torch.float64, torch.from_numpy(tokens))[0].numpy()
            lineup = (np.cumsum(marked) - 1)[ranked[marked[ranked]]]
            chosen, costs, _, _ = cpu_loops.greedy_dpp(
                exact, lineup, given, keep, everything, np.empty(0, np.int64), 0.0
            )
            decided = tokens[chosen]
            differ = np.flatnonzero(decided != proposed)
            agreed = differ[0] if differ.size else keep
            if SAFETY * np.abs(rough[:agreed] - costs[:agreed]).max() > MARGIN:
                return None
            if not differ.size:
                return torch.from_numpy(decided)
            known = decided[given : agreed + 1]
        return None
