"""How complex an image is, from its pixels alone: cheap, deterministic, before any encoder.

The image is divided into 24 x 24 cells, about the patches of a vision tower. A cell is busy if its brightness
varies: text, texture, edges. The share of busy cells is the complexity. Pixels are sampled, never averaged:
averaging would turn a page of small print into plain gray.
"""

from __future__ import annotations

from fractions import Fraction

import torch

CELLS = 24
SAMPLES = 8
SIDE = CELLS * SAMPLES
"""Pixels per side of the sampled image."""
BUSY_STD = 6.0
"""Standard deviation of brightness (0 to 255) above which a cell is busy: above the noise of a JPEG's plain
areas (about 2) and of most sensors (3 to 5)."""
STEPS = ((Fraction(1, 2), Fraction(1)), (Fraction(1, 4), Fraction(1, 2)), (Fraction(1, 16), Fraction(1, 4)))
"""(smallest share of busy cells, level); below the last share, the level is 1/8."""
_PLAIN = Fraction(1, 8)


def busy_share(gray: torch.Tensor) -> Fraction:
    """Return the share of busy cells.

    Args:
        gray: ``(SIDE, SIDE)`` uint8, the brightness of the image's sampled pixels.
    """
    if gray.shape != (SIDE, SIDE) or gray.dtype != torch.uint8:
        raise ValueError(f"gray must be ({SIDE}, {SIDE}) uint8, got {tuple(gray.shape)} {gray.dtype}")
    cells = gray.view(CELLS, SAMPLES, CELLS, SAMPLES).transpose(1, 2).reshape(CELLS * CELLS, -1).long()
    # n^2 var = n sum(x^2) - sum(x)^2, in integers: the same on every machine
    n = SAMPLES * SAMPLES
    spread = n * (cells * cells).sum(1) - cells.sum(1) ** 2
    return Fraction(int((spread > round((n * BUSY_STD) ** 2)).sum()), CELLS * CELLS)


def content_level(busy: Fraction) -> Fraction:
    """Return the share of the default that an image keeps, given its share of busy cells."""
    return next((level for share, level in STEPS if busy >= share), _PLAIN)
