"""The loops of the CPU path that go token by token, compiled by numba; single-threaded, no Python inside.

torch pays a dozen calls of microseconds for each chosen token, more than the arithmetic itself. Everything here
works on numpy arrays of either precision; the rules are those of ``torch_greedy`` and ``torch_ops``.

Importing this module imports numba (half a second) and compiles nothing; the first call of each function and
precision does, or takes it from numba's cache on disk. ``cpu_ops.warm_up`` makes those calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_STEP = 2.0**32
_EXHAUSTED = 1e-5  # torch_greedy.EXHAUSTED, which a test compares
_BLOCK = 64  # tokens whose least is looked at before they are
# No reordering of sums; only what lets a minimum and a multiply-add become vector instructions.
_FASTMATH = {"nnan", "nsz", "contract"}


def _hide_namespace() -> None:
    """Let llvmlite's handle of its library say that it has no ``__dict__``, as is true.

    It answers any name with a function. vLLM for CPU looks into the ``__dict__`` of everything it finds in loaded
    modules when an engine starts, and would trip over that answer.
    """
    from llvmlite.binding import ffi  # type: ignore[import-untyped]

    handle = type(ffi.lib)
    answer = handle.__getattr__

    def honest(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return answer(self, name)

    handle.__getattr__ = honest


_hide_namespace()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile, and keep the machine code on disk where a cache directory can be written."""
    try:
        compiled = numba.njit(cache=True, nogil=True, fastmath=_FASTMATH)(function)
    except RuntimeError:  # "no locator available": neither beside this file nor in the user's cache
        compiled = numba.njit(nogil=True, fastmath=_FASTMATH)(function)
    wrapped: Callable[..., Any] = compiled
    return wrapped


@_compiled
def mirror(matrix: Array, down: bool) -> None:
    """Copy one triangle of ``(N, N)`` over the other, in place, in tiles that stay in the nearest cache."""
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
def centre(gram: Array) -> None:
    """Take the mean token out of ``(N, N)`` float32 cosines, on and below the diagonal only, in place."""
    n = gram.shape[0]
    mean = np.zeros(n)
    for i in range(n):  # down the columns, which are the rows: no sum waits for the one before
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
    """Find the token of least cost; of costs in equal steps, the lowest index.

    Args:
        keys: ``(N,)`` float64 costs; infinite for tokens that may not be chosen.
        margin: Tokens whose cost exceeds the least one by no more than this are marked in ``near``.
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
    """Find the token of which least is explained, as ``least`` does with the square roots as costs.

    Args:
        acc: ``(T,)`` explained volume, T a multiple of ``_BLOCK``; infinite for tokens that may not be chosen.
        bits: ``(T,)`` the same memory as integers, which order floats that are not negative, and of which the
            least is found in vector instructions.
        lows: ``(T / _BLOCK,)`` of the type of ``bits``, scratch.
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
    """Add what a new token explains: one row of the Cholesky factor, eight earlier rows at a time.

    Args:
        row: ``(N,)`` the new token's cosines.
        factors: ``(R, N)``, zero from row ``used`` on; R is a multiple of 8. Row ``used`` is written.
        used: Rows in use.
        pick: The new token.
        acc: ``(T,)`` explained volume so far, T at least N; brought up to date.
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
    """Return each token's largest cosine to a given one, ``(N,)`` float64; infinite where it may not be chosen."""
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
    """Return the negative gain of each token under a quality, ``(N,)`` float64; infinite as above."""
    keys = np.full(quality.shape[0], np.inf)
    for j in range(quality.shape[0]):
        if acc[j] < 1 - _EXHAUSTED:
            keys[j] = -quality[j] * np.sqrt(1 - np.float64(acc[j]))
    return keys


def greedy_dpp(  # noqa: PLR0917  # as the loop inside, which takes no keyword-only arguments
    gram: Array, order: Array, given: int, keep: int, quality: Array, known: Array, margin: float
) -> tuple[Array, Array, Array, float]:
    """Grow a set as ``torch_greedy.greedy_dpp`` does.

    Args:
        gram: ``(N, N)`` cosines, symmetric.
        order: ``(N,)`` tokens by descending saliency.
        given: The first so many of ``order`` are in the set, at most ``keep``.
        keep: Size of the set.
        quality: ``(N,)``, or empty for none.
        known: New tokens whose choice is already quantized, in their order; may be empty.
        margin: See ``least``.

    Returns:
        The tokens ``(keep,)``; the cost at which each new one was chosen ``(keep,)``, infinite for those filled
        up from ``order``; which tokens came within the margin of a choice ``(N,)``; and the largest explained
        volume of a choice.
    """
    n = gram.shape[0]
    acc = np.full(-(-n // _BLOCK) * _BLOCK, np.inf, gram.dtype)
    acc[:n] = 0
    acc[:n][gram.diagonal() < 0.5] = 1
    acc[order[:given]] = np.inf
    bits = acc.view(f"i{acc.itemsize}")
    factors = np.zeros((-(-(keep - given) // 8) * 8, n), gram.dtype)
    return _grow(gram, order, given, keep, quality, known, margin, acc, bits, factors)  # type: ignore[no-any-return]


@_compiled
def _grow(  # noqa: PLR0917
    gram: Array,
    order: Array,
    given: int,
    keep: int,
    quality: Array,
    known: Array,
    margin: float,
    acc: Array,
    bits: Array,
    factors: Array,
) -> tuple[Array, Array, Array, float]:
    """The loop of ``greedy_dpp``, on its state: see ``explain`` and ``least_explained``."""
    n = gram.shape[0]
    picks, costs, near = order[:keep].copy(), np.zeros(keep), np.zeros(n, np.bool_)
    is_open, lows = np.ones(n, np.bool_), np.empty_like(bits[: bits.shape[0] // _BLOCK])
    is_open[order[:given]] = False
    used, place, deepest = 0, given, 0.0
    for t in range(given, keep):
        if t == given and given > 0:
            pick, cost = least(seed_keys(gram, order[:given], acc), margin, near)
        elif quality.shape[0] > 0:
            pick, cost = least(weighted_keys(quality, acc), margin, near)
        else:
            pick, cost = least_explained(acc, bits, lows, margin, near)
        if t - given < known.shape[0]:
            pick = known[t - given]
        costs[t] = cost
        if pick >= 0:
            deepest = max(deepest, np.float64(acc[pick]))
            explain(gram[pick], factors, used, pick, acc)
            used += 1
        else:
            while not is_open[order[place]]:
                place += 1
            pick = order[place]
        picks[t], is_open[pick], acc[pick] = pick, False, np.inf
    return picks, costs, near, deepest


@_compiled
def max_min_select(gram: Array, keep: int) -> Array:
    """Choose tokens as ``torch_ops.max_min_select`` does, ``(keep,)``, holding two rows beside the matrix.

    Distances are compared in the same steps; rounding is monotone, so the nearest neighbour is found on cosines.
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
