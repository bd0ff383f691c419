"""How the patches of a vision tower become visual tokens: one token for each square of patches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PatchMerge:
    """Squares of ``side`` x ``side`` patches.

    Args:
        side: Patches per token along each axis.
        in_raster_order: Whether the tower has an image's patches row by row. Otherwise the patches of a token
            follow each other, row by row within its square.
    """

    side: int
    in_raster_order: bool = False

    def squares(self, patches: Tensor, columns: int) -> Tensor:
        """Return the patches of each token.

        Args:
            patches: ``(P, ...)`` values of an image's patches.
            columns: Patches in a row of the image.

        Returns:
            ``(N, side * side, ...)`` with ``N = P / side ** 2``, tokens in the order that the tower has them.
        """
        side, rest = self.side, patches.shape[1:]
        if not self.in_raster_order or side == 1:
            return patches.reshape(-1, side**2, *rest)
        rows = patches.reshape(-1, side, columns // side, side, *rest)
        return rows.transpose(1, 2).reshape(-1, side**2, *rest)

    def mean(self, patches: Tensor, columns: int) -> Tensor:
        """Return ``(N, ...)``, for each token the mean over its patches: its saliency, keys, or a pooled row."""
        return self.squares(patches, columns).mean(dim=1)

    def side_by_side(self, patches: Tensor, columns: int) -> Tensor:
        """Return ``(N, side * side * Dv)``, the rows of each token's patches side by side."""
        return self.squares(patches, columns).flatten(1)
