"""Spectral entropy without an eigen-solve: a chain of matrix products whose traces give the result.

``sum f(lambda)`` over the eigenvalues of A, ``f(x) = -x ln x``, is the trace of ``f(A)``, and a polynomial in A
needs only products. From ``X_0 = A / L``, with L above every eigenvalue, each step ``X_(k+1) = 2 X_k - X_k X_k``
doubles the degree and moves every eigenvalue toward 1, the small ones last. This gives the resolution that the
logarithm needs near 0. ``L = trace(A^4)^(1/4)`` comes from the first product. The result is a linear combination
of traces and of inner products of consecutive matrices; ``entropy_fit`` derives the coefficients and their error
bound.

No solver, no branch on values, nothing copied to the host, and the same work for every matrix of one size. The
products must be float32: rounded to TF32 they would be off by 1e-3. Everything here is torch and runs on any
device; the CUDA path has its own products (``triton_gram``).
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import torch
from torch import Tensor

LEAST_SPREAD = 1e-6
"""Mean squared distance of the unit tokens from their mean below which they count as identical.

The matrix that the chain starts from is accurate to about 1e-8, so rounding is less than a hundredth of this.
"""

# |error| <= 3.36e-07 (1 + 30 x). `python -m promprune_vllm.kernels.entropy_fit` prints this bound and these rows.
# Row k: coefficients of the trace of X_k, and of its inner products with itself, X_(k-1) and X_(k-2).
COEFFICIENTS = (
    (-0.37975579257367681, 0.0, 0.0, 0.0),
    (0.21717484190879627, 0.0, -0.21484017554120957, 0.0),
    (-0.0036311990297252321, 0.0, 0.32253051815173733, -0.40496771977773743),
    (0.05433213774964387, 0.0, -0.023991440897260768, 0.16790200131341054),
    (0.0062464966478709971, 0.0, 0.067876216516694982, 0.021186999017227624),
    (0.016301630896135361, 0.0, 0.010040630212897401, 0.057156007529176087),
    (0.00590509141719049, 0.0, 0.021044294447718423, 0.010864647105802091),
    (0.0061255266440093034, 0.0, 0.0052342207822830807, 0.014898819398482808),
    (0.0052997417446282811, 0.0, 0.0034795193088061325, 0.0027429539692784871),
    (0.0043165426040035551, 0.0, -0.0014756808759504806, 0.0049812674603670346),
    (0.013920841937998441, 0.0, 0.0018814376583815562, 0.0024729224818114946),
    (0.017313914486211043, 0.0, 0.0014322488723340341, -0.0034136345367190824),
    (0.045070802154720528, 0.0, -0.0012434480441616633, -0.015824147284708698),
    (0.029482458789310689, 0.0, -0.021029412607943158, -0.01213662387326238),
    (0.11258763133839335, 0.0, -0.024502797871270455, -0.018136160067611543),
    (-0.014648539323585752, 0.0, -0.051936430799729733, 0.0060472314824953051),
    (-0.027957003572066982, -0.0025698941335232785, 0.025256727133977908, -0.059041709424832826),
)


class Chain(Protocol):
    """Matrix products of the chain, on ``(B, M, M)`` float32 symmetric matrices."""

    def square(self, x: Tensor) -> Tensor:
        """Return ``x x``."""

    def advance(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``new = 2 x - x x`` and its ``(B, 4)`` float64 moments; see ``moments``."""


class TorchChain:
    """The products in plain torch."""

    def square(self, x: Tensor) -> Tensor:
        """Return ``x x``."""
        return x @ x

    def advance(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``2 x - x x`` and its moments."""
        new = torch.baddbmm(x, x, x, beta=2, alpha=-1)
        return new, moments(new, x, before)


def moments(new: Tensor, *earlier: Tensor) -> Tensor:
    """Return a matrix's trace, and its inner products with itself and with up to two earlier ones, ``(B, 4)``."""
    values = [new.diagonal(dim1=1, dim2=2).sum(dim=1, dtype=torch.float64)]
    values += [(new * other).sum(dim=(1, 2), dtype=torch.float64) for other in (new, *earlier)]
    while len(values) < 4:
        values.append(torch.zeros_like(values[0]))
    return torch.stack(values, dim=1)


def spectral_entropy(scatter: Tensor, chain: Chain | None = None) -> Tensor:
    """Return the normalized entropy of the eigenvalues of each matrix.

    Args:
        scatter: ``(B, M, M)`` float64, symmetric without negative eigenvalues: the inner products of centered unit
            tokens, or of their columns. M is at least 2.
        chain: The matrix products; plain torch by default.

    Returns:
        ``(B,)`` float64 in [0, 1]; 1 for identical tokens.
    """
    chain = chain or TorchChain()
    size = scatter.shape[1]
    total = scatter.diagonal(dim1=1, dim2=2).sum(dim=1)
    flat = ~(total >= LEAST_SPREAD * size)
    length = torch.where(flat, 1, torch.linalg.vector_norm(scatter, dim=(1, 2)))[:, None, None]
    a = _pad((scatter / length).float())
    square = chain.square(a)
    top = torch.linalg.vector_norm(square, dim=(1, 2), dtype=torch.float64).sqrt()  # trace(a^4)^(1/4)
    top = torch.where(flat, 1, top).float()[:, None, None]
    before = a / top
    x = 2 * before - square / (top * top)
    rows = [moments(before), moments(x, before)]
    for _ in range(len(COEFFICIENTS) - 2):
        new, row = chain.advance(x, before)
        rows.append(row)
        x, before = new, x
    spread = rows[0][:, 0]  # trace(A) / L
    entropy = (
        spread.log() + (torch.stack(rows, dim=1) * _coefficients(scatter.device)).sum(dim=(1, 2)) / spread
    ) / math.log(size)
    return torch.where(flat, 1, entropy).clamp(0, 1)


@functools.cache
def _coefficients(device: torch.device) -> Tensor:
    """Return the coefficients on a device, copied there once: CUDA graphs cannot capture copies from the host."""
    return torch.tensor(COEFFICIENTS, dtype=torch.float64).to(device)


def _pad(x: Tensor) -> Tensor:
    """Pad matrices with rows and columns of zeros to a multiple of 16; zeros add nothing to any moment."""
    missing = -x.shape[1] % 16
    return torch.nn.functional.pad(x, (0, missing, 0, missing)) if missing else x
