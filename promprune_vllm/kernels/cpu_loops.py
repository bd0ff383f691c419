"""The token-by-token loops of the CPU path, compiled by numba; single-threaded, no Python inside.

torch needs a dozen calls of microseconds per chosen token, more than the arithmetic itself. Everything here works
on numpy arrays of either precision, by the rules of ``torch_greedy`` and ``torch_ops``.

Importing this module imports numba (half a second) and compiles nothing. The first call of each function and
precision compiles it, or loads it from numba's cache on disk. ``cpu_ops.warm_up`` makes those calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_Growth = tuple[Array, Array, Array, float]
_STEP = 2.0**32
_EXHAUSTED = 1e-5  # torch_greedy.EXHAUSTED, which a test compares
_BLOCK = 64  # tokens per block; only blocks with a small enough minimum are searched
# No reordering of sums; only what lets minimum and multiply-add become vector instructions.
_FASTMATH = {"nnan", "nsz", "contract"}


def _hide_namespace() -> None:
    """Make llvmlite's library handle raise ``AttributeError`` for ``__dict__``, which it does not have.

    The handle returns a function for any attribute name. When an engine starts, vLLM for CPU reads ``__dict__`` of
    everything it finds in loaded modules, and would fail on a function.
    """
    from llvmlite.binding import ffi  # type: ignore[import-untyped]

    handle = type(ffi.lib)
    original = handle.__getattr__

    def without_namespace(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return original(self, name)

    handle.__getattr__ = without_namespace


_hide_namespace()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, and keep the machine code on disk if a cache directory can be written."""
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True, fastmath=_FASTMATH)(function)
    except RuntimeError:  # "no locator available": neither next to this file nor in the user's cache
        compiled = numba.njit(nogil=True, fastmath=_FASTMATH)(function)
    return compiled


@_compiled
def mirror(matrix: Array, down: bool) -> None:
    """Copy one triangle of ``(N, N)`` to the other, in place, in tiles that stay in the nearest cache."""
    n = matrix.shape[0]
    for top in range(0, n, _BLOCK):
        bottom = min(n, top + _BLOCK)
        for left in range(0, bottom, _BLOCK):
            for i in range(top, bottom):
                for j in range(left, min(i, left + _BLOCK)):
                    if down:
                        matrix[i, j] = matrix[j, i]
                    else:
                        matrix[j, i] = matrix[i, j]


@_compiled
def center(gram: Array) -> None:
    """Remove the mean token from ``(N, N)`` float32 cosines, on and below the diagonal only, in place."""
    n = gram.shape[0]
    mean = np.zeros(n)
    for i in range(n):  # adds whole rows, so that no sum waits for the one before; the matrix is symmetric
        row = gram[i]
        for j in range(n):
            mean[j] += row[j]
    mean /= n
    offset = (mean - mean.mean() / 2).astype(gram.dtype)
    for i in range(n):
        row, own = gram[i], offset[i]
        for j in range(i + 1):
            row[j] = row[j] - own - offset[j]


@_compiled
def least(keys: Array, margin: float, near: Array) -> tuple[int, float]:
    """Find the token of least cost; ties, in steps of 2**-32, go to the lowest index.

    Args:
        keys: ``(N,)`` float64 costs; infinite for tokens that must not be chosen.
        margin: Tokens whose cost exceeds the least one by at most this are marked in ``near``.
        near: ``(N,)`` bool, written to.

    Returns:
        The token and its cost; -1 and infinity if there is none.
    """
    cost = keys[0]
    for j in range(1, keys.shape[0]):
        cost = min(cost, keys[j])
    pick, fewest = -1, np.inf
    if cost < np.inf:
        limit = cost + max(margin, 2 / _STEP)
        for j in range(keys.shape[0]):
            if keys[j] <= limit:
                near[j] = True
                steps = np.rint(keys[j] * _STEP)
                if steps < fewest:
                    pick, fewest = j, steps
    return pick, cost


@_compiled
def least_explained(acc: Array, bits: Array, lows: Array, margin: float, near: Array) -> tuple[int, float]:
    """Find the least explained token, as ``least`` does with the square roots of ``acc`` as costs.

    Args:
        acc: ``(T,)`` explained volume, T a multiple of ``_BLOCK``; infinite for tokens that must not be chosen.
        bits: ``(T,)`` the same memory as integers: they order floats that are not negative, and vector
            instructions find their minimum.
        lows: ``(T / _BLOCK,)`` scratch memory of the type of ``bits``.
        margin, near: See ``least``.
    """
    for c in range(lows.shape[0]):
        low = bits[c * _BLOCK]
        for j in range(_BLOCK):
            low = min(low, bits[c * _BLOCK + j])
        lows[c] = low
    least_of = lows.view(acc.dtype)
    squared = np.float64(least_of.min())
    if not squared < 1 - _EXHAUSTED:
        return -1, np.inf
    cost = np.sqrt(squared)
    reach = cost + max(margin, 2 / _STEP)
    pick, fewest = -1, np.inf
    for c in range(least_of.shape[0]):
        if least_of[c] <= reach * reach:
            for j in range(c * _BLOCK, c * _BLOCK + _BLOCK):
                if acc[j] <= reach * reach and acc[j] < 1 - _EXHAUSTED:
                    near[j] = True
                    steps = np.rint(np.sqrt(np.float64(acc[j])) * _STEP)
                    if steps < fewest:
                        pick, fewest = j, steps
    return pick, cost


@_compiled
def explain(row: Array, factors: Array, used: int, pick: int, acc: Array) -> None:
    """Add what a new token explains: one row of the Cholesky factor, from eight earlier rows at a time.

    Args:
        row: ``(N,)`` cosines of the new token.
        factors: ``(R, N)``, zero from row ``used`` on; R is a multiple of 8. Row ``used`` is written.
        used: Number of rows in use.
        pick: The new token.
        acc: ``(T,)`` explained volume so far, T at least N; updated.
    """
    e = row.copy()
    for s in range(0, used, 8):
        a, b, c, d = factors[s, pick], factors[s + 1, pick], factors[s + 2, pick], factors[s + 3, pick]
        fa, fb, fc, fd = factors[s], factors[s + 1], factors[s + 2], factors[s + 3]
        g, h, k, m = factors[s + 4, pick], factors[s + 5, pick], factors[s + 6, pick], factors[s + 7, pick]
        fg, fh, fk, fm = factors[s + 4], factors[s + 5], factors[s + 6], factors[s + 7]
        for j in range(e.shape[0]):
            e[j] -= (a * fa[j] + b * fb[j] + c * fc[j] + d * fd[j]) + (
                g * fg[j] + h * fh[j] + k * fk[j] + m * fm[j]
            )
    scale = e.dtype.type(1 / np.sqrt(max(1 - np.float64(acc[pick]), _EXHAUSTED)))
    into = factors[used]
    for j in range(e.shape[0]):
        value = e[j] * scale
        into[j] = value
        acc[j] += value * value


@_compiled
def seed_keys(gram: Array, given: Array, acc: Array) -> Array:
    """Return each token's largest cosine to a given one, ``(N,)`` float64; infinite if it must not be chosen."""
    nearest = np.full(gram.shape[0], -np.inf)
    for g in given:
        row = gram[g]
        for j in range(nearest.shape[0]):
            nearest[j] = max(nearest[j], row[j])
    for j in range(nearest.shape[0]):
        if acc[j] >= 1 - _EXHAUSTED:
            nearest[j] = np.inf
    return nearest


@_compiled
def weighted_keys(quality: Array, acc: Array) -> Array:
    """Return the negative gain of each token, weighted by quality, ``(N,)`` float64; infinite as above."""
    keys = np.full(quality.shape[0], np.inf)
    for j in range(quality.shape[0]):
        if acc[j] < 1 - _EXHAUSTED:
            keys[j] = -quality[j] * np.sqrt(1 - np.float64(acc[j]))
    return keys


def greedy_dpp(  # noqa: PLR0917  # like the loop inside, which takes no keyword-only arguments
    gram: Array, order: Array, given: int, keep: int, quality: Array, prefix: Array, margin: float
) -> _Growth:
    """Grow a set as ``torch_greedy.greedy_dpp`` does.

    Args:
        gram: ``(N, N)`` cosines, symmetric.
        order: ``(N,)`` tokens by descending saliency.
        given: Number of tokens at the start of ``order`` that are already in the set, at most ``keep``.
        keep: Size of the set.
        quality: ``(N,)``, or empty for none.
        prefix: The first new tokens, if already decided, in order; may be empty.
        margin: See ``least``.

    Returns:
        The tokens ``(keep,)``; the cost at which each new one was chosen ``(keep,)``, infinite if it was filled
        from ``order``; which tokens came within the margin of a choice ``(N,)``; the largest explained volume of
        a choice.
    """
    n = gram.shape[0]
    acc = np.full(-(-n // _BLOCK) * _BLOCK, np.inf, gram.dtype)
    acc[:n] = gram.diagonal() < 0.5  # zero rows count as explained
    acc[order[:given]] = np.inf
    bits = acc.view(f"i{acc.itemsize}")
    factors = np.zeros((-(-(keep - given) // 8) * 8, n), gram.dtype)
    result: _Growth = _grow(gram, order, given, keep, quality, prefix, margin, acc, bits, factors)
    return result


@_compiled
def _grow(  # noqa: PLR0917
    gram: Array,
    order: Array,
    given: int,
    keep: int,
    quality: Array,
    prefix: Array,
    margin: float,
    acc: Array,
    bits: Array,
    factors: Array,
) -> _Growth:
    """Run the loop of ``greedy_dpp`` on its state: see ``explain`` and ``least_explained``."""
    n = gram.shape[0]
    picks, costs, near = order[:keep].copy(), np.zeros(keep), np.zeros(n, np.bool_)
    is_open, lows = np.ones(n, np.bool_), np.empty_like(bits[: bits.shape[0] // _BLOCK])
    is_open[order[:given]] = False
    used, rank, deepest = 0, given, 0.0
    for t in range(given, keep):
        if t == given and given > 0:
            pick, cost = least(seed_keys(gram, order[:given], acc), margin, near)
        elif quality.shape[0] > 0:
            pick, cost = least(weighted_keys(quality, acc), margin, near)
        else:
            pick, cost = least_explained(acc, bits, lows, margin, near)
        if t - given < prefix.shape[0]:
            pick = prefix[t - given]
        costs[t] = cost
        if pick >= 0:
            deepest = max(deepest, np.float64(acc[pick]))
            explain(gram[pick], factors, used, pick, acc)
            used += 1
        else:
            while not is_open[order[rank]]:
                rank += 1
            pick = order[rank]
        picks[t], is_open[pick], acc[pick] = pick, False, np.inf
    return picks, costs, near, deepest


@_compiled
def max_min_select(gram: Array, keep: int) -> Array:
    """Choose tokens as ``torch_ops.max_min_select`` does, ``(keep,)``, with only two rows besides the matrix.

    Distances are compared in the same steps. Rounding is monotone, so cosines give the nearest neighbor.
    """
    n = gram.shape[0]
    nearest, closest = np.full(n, -np.inf), np.full(n, -np.inf)  # largest cosine to another; to a chosen token
    for i in range(n):
        row = gram[i]
        for j in range(i):
            nearest[i] = max(nearest[i], row[j])
        for j in range(i + 1, n):
            nearest[i] = max(nearest[i], row[j])
    picks, is_open = np.empty(keep, np.int64), np.ones(n, np.bool_)
    for t in range(keep):
        pick, farthest = -1, -np.inf
        for j in range(n):
            steps = np.rint((1 - (nearest[j] if t == 0 else closest[j])) * _STEP)
            if is_open[j] and (pick < 0 or steps > farthest):
                pick, farthest = j, steps
        picks[t], is_open[pick] = pick, False
        row = gram[pick]
        for j in range(n):
            closest[j] = max(closest[j], row[j])
    return picks
