"""One float32 Gram for the entropy and the DPP of a group, with every choice of the DPP made in float64.

In float32, the costs of tokens are off by about 1e-7, and the best candidates are often that close. But only few
tokens ever come close to being chosen:

1. Propose: run the greedy loop on the float32 Gram, marking the tokens within ``MARGIN`` of each choice.
2. Decide: compute the float64 cosines of the marked tokens, a few more than K, and run the loop on those alone. A
   token that was never close cannot be chosen, so the result is the same as with the whole float64 matrix.
3. If the two results differ, propose again, with the decided tokens fixed up to the first difference.

The rounding error is not bounded in advance but measured: at every choice, the costs in float32 and float64 may
differ by at most an eighth of the margin. If they differ by more, if hardly anything is left to explain (a
threshold then decides when to fill up from the order), or if the proposals do not converge, the whole matrix is
computed in float64.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from promprune_vllm.kernels import cpu_gram, cpu_ops, torch_ops

MARGIN = 2e-5
"""Costs closer than this are compared in float64. Proposals were off by at most 1.6e-6, over 23 spectra."""
SAFETY = 8
"""How many times the measured error must fit into the margin."""
PROPOSALS = 4
DEEPEST = 0.999
"""Explained volume of a choice beyond which the float64 matrix is used: exhaustion is at 1 - 1e-5."""


class Cosines:
    """The cosines of one group of tokens, like ``torch_cosines.Cosines``.

    Args:
        features: ``(N, D)`` tokens of any floating type.
    """

    def __init__(self, features: Tensor) -> None:
        self._features = features

    @cached_property
    def single(self) -> tuple[Tensor, Tensor]:
        """Return ``(N, N)`` float32 cosines, and the features, scaled if needed to stay in range."""
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

    def greedy_dpp(self, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
        """Return the ``(keep,)`` tokens. With a quality, all is in float64: the margin is for costs without."""
        salient = int(given)
        if salient >= keep:
            return order[:keep].clone()
        picks = None
        if quality is None and cpu_ops.single_is_exact():
            picks = self._propose_and_decide(order, salient, keep)
        return cpu_ops.greedy_dpp(self.matrix(), order, given, keep, quality) if picks is None else picks

    def _propose_and_decide(self, order: Tensor, given: int, keep: int) -> Tensor | None:
        """Propose in float32 and decide in float64; ``None`` if that would not be reliable."""
        from promprune_vllm.kernels import cpu_loops

        gram, features = self.single
        ranking = order.contiguous().numpy()
        prefix, no_quality = np.empty(0, np.int64), np.empty(0)
        marked = np.zeros(gram.shape[0], np.bool_)
        marked[ranking[:given]] = True
        for _ in range(PROPOSALS):
            proposal, single_costs, near, deepest = cpu_loops.greedy_dpp(
                gram.numpy(), ranking, given, keep, no_quality, prefix, MARGIN
            )
            marked |= near
            marked[proposal] = True
            if deepest > DEEPEST or not np.isfinite(single_costs).all():
                return None
            tokens = np.flatnonzero(marked)  # ascending, so that ties still go to the lowest token
            exact = cpu_gram.cosines(features, torch.float64, torch.from_numpy(tokens))[0].numpy()
            lineup = (np.cumsum(marked) - 1)[ranking[marked[ranking]]]
            picks, costs, _, _ = cpu_loops.greedy_dpp(
                exact, lineup, given, keep, no_quality, np.empty(0, np.int64), 0.0
            )
            decision = tokens[picks]
            differences = np.flatnonzero(decision != proposal)
            agreement = differences[0] if differences.size else keep
            if SAFETY * np.abs(single_costs[:agreement] - costs[:agreement]).max() > MARGIN:
                return None
            if not differences.size:
                return torch.from_numpy(decision)
            prefix = decision[given : agreement + 1]
        return None
