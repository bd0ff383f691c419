"""Derives the coefficients of ``entropy_chain``: ``python -m promprune_vllm.kernels.entropy_fit``.

``f(x) = -x ln x`` on [0, 1] is fitted with functions that a chain of squares yields for free. With ``y = 1 - x``
and ``x_k = 1 - y**(2**k)``, which are the eigenvalues of the chain's matrices ``X_k``, the basis is

    x_k,    x_k * x_(k-1),    x_k * x_(k-2)    for k = 0 ... PRODUCTS,    and    x_PRODUCTS squared:

traces and inner products of three consecutive matrices. Each function is 0 at 0, as f is, so eigenvalues of 0 add
nothing, however many there are.

The error is weighted by ``1 / (1 + SLOPE x)``: the eigenvalues have a fixed sum, so an error proportional to x
costs little. Weighted least squares is repeated with higher weights for the largest errors (Lawson's algorithm)
until the error is nearly the same everywhere. With ``|error| <= BOUND (1 + SLOPE x)``, eigenvalues bounded by L
with the sum T give a normalized entropy that is accurate to ``BOUND (n L / T + SLOPE) / ln n``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PRODUCTS = 16
SLOPE = 30
ROUNDS = 120

Array = NDArray[np.float64]


def basis(x: Array) -> Array:
    """Return ``(points, PRODUCTS + 1, 4)``: ``x_k`` alone, squared, by ``x_(k-1)`` and by ``x_(k-2)``."""
    with np.errstate(divide="ignore"):
        log = np.log1p(-x)
    powers = np.stack([-np.expm1(2.0**k * log) for k in range(PRODUCTS + 1)], axis=1)
    columns = np.zeros((*powers.shape, 4))
    columns[..., 0] = powers
    columns[..., 1] = powers**2
    columns[:, 1:, 2] = powers[:, 1:] * powers[:, :-1]
    columns[:, 2:, 3] = powers[:, 2:] * powers[:, :-2]
    return columns


def target(x: Array) -> Array:
    """Return ``-x ln x``, which is 0 at 0."""
    value: Array = -x * np.log(np.where(x > 0, x, 1))
    return value


def error(coefficients: Array, x: Array) -> Array:
    """Return the weighted error at the points x in [0, 1]."""
    return np.abs(np.tensordot(basis(x), coefficients, 2) - target(x)) / (1 + SLOPE * x)


def used() -> NDArray[np.bool_]:
    """Return which functions the fit uses, ``(PRODUCTS + 1, 4)``. Of the squares, only the last adds anything."""
    mask = np.ones((PRODUCTS + 1, 4), np.bool_)
    mask[:-1, 1] = False
    mask[0, 2:] = mask[1, 3] = False
    return mask


def fit() -> Array:
    """Return the coefficients, ``(PRODUCTS + 1, 4)``."""
    x = np.unique(np.concatenate([np.logspace(-9, 0, 800), np.linspace(1e-3, 1, 400)]))
    mask = used()
    columns = basis(x)[:, mask] / (1 + SLOPE * x)[:, None]
    values = target(x) / (1 + SLOPE * x)
    size = np.linalg.norm(columns, axis=0)
    penalty = 3e-7 * np.eye(len(size))  # prefers small coefficients, since large ones amplify rounding
    weights, smallest = np.ones_like(x), np.inf
    coefficients = np.zeros(mask.shape)
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        left = np.vstack([columns * root[:, None] / size, penalty])
        q, r = np.linalg.qr(left)
        solution = np.linalg.solve(r, q[: len(x)].T @ (values * root)) / size
        errors = np.abs(columns @ solution - values)
        if errors.max() < smallest:
            smallest, coefficients[mask] = errors.max(), solution
        weights = np.maximum(weights * (errors / errors.max() + 1e-3), 1e-8 * weights.max())
        weights /= weights.max()
    return coefficients


def bound(coefficients: Array, points: int = 400_000) -> float:
    """Return the largest weighted error over ``points`` points, densest where the function is steepest."""
    x = np.concatenate([np.logspace(-12, 0, points // 2), np.linspace(0, 1, points // 2)])
    return max(float(error(coefficients, part).max()) for part in np.array_split(x, max(1, points // 10_000)))


if __name__ == "__main__":
    fitted = fit()
    print(f"# |error| <= {bound(fitted):.2e} (1 + {SLOPE} x)")
    for row in fitted:
        print("    (" + ", ".join(f"{value:.17g}" if value else "0.0" for value in row) + "),")
