"""Synthetic features with known spectra, for the kernel benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Draw = Callable[..., Tensor]


def _power(exponent: float) -> Callable[[Draw, int, int], Tensor]:
    """Gaussian tokens with column j scaled by ``j ** -exponent``: eigenvalues fall as ``j ** (-2 exponent)``."""
    return lambda draw, n, d: draw(n, d) * torch.arange(1, d + 1) ** -exponent


def _clusters(count: int, noise: float) -> Callable[[Draw, int, int], Tensor]:
    return lambda draw, n, d: draw(count, d)[torch.arange(n) % count] + noise * draw(n, d)


def _low_rank(rank: int, noise: float) -> Callable[[Draw, int, int], Tensor]:
    return lambda draw, n, d: draw(n, rank) @ draw(rank, d) / rank**0.5 + noise * draw(n, d)


def _offset(size: float) -> Callable[[Draw, int, int], Tensor]:
    """Power 0.5 plus a common vector: mean cosines are about 0.5 (size 1) and 0.9 (size 3)."""

    def make(draw: Draw, n: int, d: int) -> Tensor:
        scale = torch.arange(1, d + 1) ** -0.5
        common = draw(1, d) * scale
        return draw(n, d) * scale + size * common

    return make


FAMILIES: Mapping[str, Callable[[Draw, int, int], Tensor]] = MappingProxyType(
    {
        "white": lambda draw, n, d: draw(n, d),
        "power 0.5": _power(0.5),
        "power 0.75": _power(0.75),
        "power 1": _power(1.0),
        "power 1.5": _power(1.5),
        "exponential 64": lambda draw, n, d: draw(n, d) * torch.exp(-torch.arange(d) / 64),
        "8 clusters": _clusters(8, 0.3),
        "48 clusters": _clusters(48, 0.1),
        "rank 16 + noise": _low_rank(16, 0.03),
        "48 different": _clusters(48, 0.0),
        "offset 0.5": _offset(1.0),
        "offset 0.9": _offset(3.0),
    }
)
"""Twelve kinds of token sets: Gaussian, power laws, exponential, clusters, low rank, repeated, off-center."""

TIMED = "power 0.5"


def features(family: str, n: int, d: int, seed: int = 0) -> Tensor:
    """Return ``(n, d)`` float32 tokens of a family."""
    generator = torch.Generator().manual_seed(seed)
    return FAMILIES[family](lambda *shape: torch.randn(*shape, generator=generator), n, d)
