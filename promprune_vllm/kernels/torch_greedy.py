"""Plain torch reference of the rules that grow a set token by token: DPP, farthest points, facility location.

All three extend a partly given set, entirely on the device: the number of given tokens is a tensor, and no choice
goes through the host. They share these conventions:

* The next token is the one of least cost. Costs are compared in steps of 2**-32, far above the rounding of
  float64 and far below any meaningful difference, so equal tokens tie exactly on every machine, and the lowest
  index wins.
* A token is chosen at most once.
* A token that adds nothing (it is within ``EXHAUSTED`` of what the set already explains, or it is a zero row,
  which has no direction) is not chosen by the rule. Once no others are left, the set is filled from ``order``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from promprune_vllm.kernels.torch_ops import quantized

EXHAUSTED = 1e-5
"""Residual volume (squared distance, in units of the token's norm) below which a token adds nothing."""


def greedy_dpp(gram: Tensor, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None) -> Tensor:
    """Extend a given set by greedy MAP inference of a determinantal point process over the rest.

    Well-conditioned form of the fast greedy algorithm (Chen et al., NeurIPS 2018): the diagonal is taken as
    exactly 1 and the explained part of each token, ``acc = sum e**2``, is accumulated from exactly 0, so that
    no choice is decided by the rounding of ``1 - 1``. The next token is the least explained one. Once nothing
    is left to explain (``1 - acc`` at most 1e-5), the set is filled from ``order``.

    Args:
        gram: ``(N, N)`` cosines.
        order: ``(N,)`` int64, tokens by descending saliency.
        given: 0-d int64, on the device: the first ``given`` tokens of ``order`` are already in the set. They
            cannot be chosen again, and the first new token is the one least similar to them; the determinant is
            not conditioned on them.
        keep: Size of the set, ``1 <= keep < N``.
        quality: ``(N,)`` at least 0: the kernel becomes ``diag(quality) gram diag(quality)``. Its factor is
            that of ``gram`` with scaled columns, so a token's gain is ``quality**2 * (1 - acc)``.

    Returns:
        ``(keep,)`` int64: the given tokens in order, then the new ones in the order they were picked.
    """
    is_given = _ranks(order) < given
    return _grow(
        lambda pick: gram.index_select(0, pick).squeeze(0),
        _nearest_given(gram, is_given),
        _GrowingSet(gram.diagonal(), order, given, keep),
        quality,
    )


def greedy_dpp_by_rows(
    unit: Tensor, order: Tensor, given: Tensor, keep: int, quality: Tensor | None = None
) -> Tensor:
    """Do what ``greedy_dpp`` does, one row of cosines at a time: O(N K) memory instead of O(N^2) for a matrix.

    Args:
        unit: ``(N, D)`` float64 tokens of length 1, or 0.
        order, given, keep, quality: See ``greedy_dpp``.
    """
    first = unit.index_select(0, order[:keep])  # (K, D) the tokens that may be given
    is_new = torch.arange(keep, device=order.device) >= given
    nearest = (unit @ first.T).masked_fill_(is_new, -torch.inf).amax(dim=1)
    state = _GrowingSet((unit * unit).sum(dim=1), order, given, keep)
    return _grow(lambda pick: unit @ unit.index_select(0, pick).squeeze(0), nearest, state, quality)


def _grow(row: Callable[[Tensor], Tensor], nearest: Tensor, state: _GrowingSet, quality: Tensor | None) -> Tensor:
    """Take every token of a DPP; ``row`` returns one token's cosines to all tokens."""
    acc = state.is_zero.to(nearest.dtype)
    keep, total = state.picks.shape[0], acc.shape[0]
    factors = acc.new_zeros(keep, total)  # row t: every token along the t-th new direction
    for t in range(keep):
        cost = acc.sqrt() if quality is None else -quality * (1 - acc).clamp_min(0).sqrt()
        cost = torch.where(state.is_seed(t), nearest, cost).masked_fill(acc >= 1 - EXHAUSTED, torch.inf)
        pick, chosen = state.take(t, cost)
        explained = factors[:t].index_select(1, pick).squeeze(1) @ factors[:t]
        residual = row(pick) - explained
        e = residual / (1 - acc.index_select(0, pick)).clamp_min(EXHAUSTED).sqrt()
        factors[t] = torch.where(chosen, e, torch.zeros_like(e))
        acc = acc + factors[t] * factors[t]
    return state.picks


def farthest_points(gram: Tensor, order: Tensor, given: Tensor, keep: int, *, from_given: bool = False) -> Tensor:
    """Extend a given set by farthest-point sampling: the token whose nearest chosen one is farthest.

    Args:
        gram: ``(N, N)`` cosines; the distance is ``1 - cosine``.
        order: As for ``greedy_dpp``.
        given: As for ``greedy_dpp``: the first new token is the one least similar to the given ones.
        keep: Size of the set.
        from_given: Keep away from the given tokens at every step, not just the first.

    Returns:
        ``(keep,)`` int64: the given tokens in order, then the new ones in the order they were picked.
    """
    state = _GrowingSet(gram.diagonal(), order, given, keep)
    nearest = _nearest_given(gram, state.is_given)
    closest = nearest if from_given else torch.full_like(nearest, -torch.inf)  # (N,) cosine to the set
    for t in range(keep):
        adds_nothing = state.is_zero | (1 - closest <= EXHAUSTED)
        cost = torch.where(state.is_seed(t), nearest, closest).masked_fill(adds_nothing, torch.inf)
        pick, chosen = state.take(t, cost)
        closer = torch.maximum(closest, gram.index_select(0, pick).squeeze(0))
        closest = torch.where(chosen, closer, closest)
    return state.picks


def facility_location(gram: Tensor, order: Tensor, given: Tensor, keep: int) -> Tensor:
    """Extend a given set by the tokens that best represent all tokens outside it.

    Greedily maximizes ``sum_i max_j cos(i, j)`` over the tokens i that are not given and the new tokens j. Each
    of the ``keep`` steps uses the whole matrix: O(keep N^2).

    Args:
        gram: ``(N, N)`` cosines.
        order: As for ``greedy_dpp``.
        given: As for ``greedy_dpp``, but the given tokens do not seed the first new one.
        keep: Size of the set.

    Returns:
        ``(keep,)`` int64: the given tokens in order, then the new ones in the order they were picked.
    """
    state = _GrowingSet(gram.diagonal(), order, given, keep)
    ground = (~state.is_given & ~state.is_zero).to(gram.dtype)
    coverage = torch.full_like(ground, -1)  # (N,) cosine to the best new token so far
    for t in range(keep):
        gain = ground @ (gram - coverage[:, None]).clamp_min(0)
        cost = (-gain).masked_fill(state.is_zero | (gain <= EXHAUSTED), torch.inf)
        pick, chosen = state.take(t, cost)
        improved = torch.maximum(coverage, gram.index_select(0, pick).squeeze(0))
        coverage = torch.where(chosen, improved, coverage)
    return state.picks


def _ranks(order: Tensor) -> Tensor:
    """Return each token's rank in the order, ``(N,)``."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device)
    return rank


def _nearest_given(gram: Tensor, is_given: Tensor) -> Tensor:
    """Return each token's largest cosine to a given one, ``(N,)``; -inf if none is given."""
    return gram.masked_fill(~is_given[None, :], -torch.inf).amax(dim=1)


class _GrowingSet:
    """A set that grows to ``keep`` tokens: the state that the rules share."""

    def __init__(self, diagonal: Tensor, order: Tensor, given: Tensor, keep: int) -> None:
        self._total = order.shape[0]
        self._given = given
        self._rank = _ranks(order)
        self._open = torch.ones_like(order, dtype=torch.bool)
        self.is_given = self._rank < given  # (N,)
        self.is_zero = diagonal < 0.5  # (N,) zero rows; every other token has cosine 1 with itself
        self.picks = order.new_empty(keep)

    def is_seed(self, t: int) -> Tensor:
        """Return whether the t-th token is the first new one after given ones, 0-d bool."""
        return (self._given == t) & (self._given > 0)

    def take(self, t: int, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Take the t-th token: a given one, else the one of least cost, else the next in the order.

        Returns:
            The token, ``(1,)`` int64, and whether the rule chose it, ``(1,)`` bool.
        """
        steps = quantized(cost).masked_fill(~self._open | self.is_given, torch.inf)
        least = steps.argmin(dim=0, keepdim=True)
        next_in_order = self._rank.masked_fill(~self._open, self._total).argmin(dim=0, keepdim=True)
        chosen = (steps.index_select(0, least) < torch.inf) & (self._given <= t)
        pick = torch.where(chosen, least, next_in_order)
        self.picks[t : t + 1] = pick
        self._open.index_fill_(0, pick, False)
        return pick, chosen
