"""Controls that every method must beat: ``random``, ``uniform`` and ``downsample``.

Random selection is a strong baseline: UniPruneBench (arXiv 2511.02650) reports that it beats most published
methods on LLaVA-1.5-7B with 66.7% and 77.8% of the tokens pruned. Every comparison of methods includes it.
Lower resolution is another: VTC-Bench (arXiv 2510.07143) reports that it beats most methods on many benchmarks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import finite_rows, token_keys


@register
@dataclass(frozen=True, slots=True)
class Random:
    """Random tokens, drawn uniformly and seeded by the image's content so that caches stay valid.

    Args:
        seed: A different seed draws a different set for the same image.
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[Need] = Need.PROJECTED
    paper: ClassVar[str] = "control"
    merges: ClassVar[bool] = False

    seed: int = 0

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep the tokens with the smallest content-seeded keys."""
        keys = token_keys(features.projected, self.seed)  # (N,)
        return Selection(torch.argsort(keys, stable=True)[:keep].sort().values)


@register
@dataclass(frozen=True, slots=True)
class Uniform:
    """Evenly spaced tokens in raster order, regardless of content: token ``floor((i + 1/2) N / K)`` for each i."""

    name: ClassVar[str] = "uniform"
    needs: ClassVar[Need] = Need.PROJECTED
    paper: ClassVar[str] = "control"
    merges: ClassVar[bool] = False

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep every (N/K)-th token."""
        return Selection(evenly_spaced(keep, features.tokens, features.projected.device))


def evenly_spaced(keep: int, total: int, device: torch.device) -> Tensor:
    """Return ``keep`` of ``total`` tokens, ``(keep,)`` int64: ``floor((i + 1/2) total / keep)`` for each i."""
    steps = torch.arange(keep, device=device)
    return (2 * steps + 1) * total // (2 * keep)


@register
@dataclass(frozen=True, slots=True)
class Downsample:
    """A lower resolution: the mean of each of K nearly equal cells of the grid, regardless of content.

    For towers with a fixed number of tokens. Where an image with fewer pixels has fewer tokens, its client can
    send such an image instead, which needs no plugin and saves the tower's work too (VTC-Bench does that).

    The grid is cut into bands of rows, and each band into cells. The number of bands makes cells as square as
    possible: for 64 of 24 x 24 tokens, 8 bands of 8 cells of 3 x 3. If K is no product of two such numbers, bands
    have cells of two widths, so that there are exactly K. Several frames are one tall grid. Each mean takes the
    position of the token in the middle of its cell. Rows with NaN or infinity count as zeros; means are float64.
    """

    name: ClassVar[str] = "downsample"
    needs: ClassVar[Need] = Need.PROJECTED
    paper: ClassVar[str] = "control"
    merges: ClassVar[bool] = True

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep the means of ``keep`` cells."""
        frames, height, width = features.grid
        cells = Cells.of(frames * height, width, keep, features.projected.device)
        rows = cells.mean(finite_rows(features.projected))
        return Selection(cells.middle(), rows=rows.to(features.projected.dtype))


@dataclass(frozen=True, slots=True)
class Cells:
    """A grid cut into K nearly equal cells, in raster order.

    Args:
        columns: Columns of the grid.
        top, bottom: ``(K,)`` first row of each cell, and the row after its last.
        left, right: ``(K,)`` the same of its columns.
        tallest, widest: Largest number of rows and of columns of a cell.
    """

    columns: int
    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor
    tallest: int
    widest: int

    @classmethod
    def of(cls, rows: int, columns: int, keep: int, device: torch.device) -> Cells:
        """Cut ``rows`` x ``columns`` tokens into ``keep`` cells, at most one per token."""
        bands = _bands(rows, columns, keep)
        cell = torch.arange(keep, device=device)
        band = (
            (cell + 1) * bands - 1
        ) // keep  # band b has cells floor(b K / bands) to floor((b + 1) K / bands) - 1
        first, after = band * keep // bands, (band + 1) * keep // bands
        number, count = cell - first, after - first
        return cls(
            columns,
            top=band * rows // bands,
            bottom=(band + 1) * rows // bands,
            left=number * columns // count,
            right=(number + 1) * columns // count,
            tallest=-(-rows // bands),
            widest=-(-columns // (keep // bands)),
        )

    def middle(self) -> Tensor:
        """Return the token in the middle of each cell, ``(K,)`` int64, strictly increasing."""
        return (self.top + self.bottom - 1) // 2 * self.columns + (self.left + self.right - 1) // 2

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of each cell, ``(K, D)``, of ``(N, D)`` tokens."""
        across = self.left[:, None] + torch.arange(self.widest, device=x.device)  # (K, widest)
        inside = across < self.right[:, None]
        total = x.new_zeros(len(self.top), x.shape[1])
        for down in range(self.tallest):
            row = self.top + down
            here = inside & (row < self.bottom)[:, None]
            tokens = torch.where(here, row[:, None] * self.columns + across, 0)
            total += (x[tokens] * here[..., None]).sum(dim=1)
        return total / ((self.bottom - self.top) * (self.right - self.left))[:, None]


def _bands(rows: int, columns: int, keep: int) -> int:
    """Return the number of bands whose cells are closest to squares, and at least one token wide and high."""
    fewest, most = -(-keep // columns), min(rows, keep)
    return min(range(fewest, most + 1), key=lambda bands: abs(math.log(bands**2 * columns / (keep * rows))))
