"""What a method may look at: the visual tokens of one group, with whatever the host could capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Flag, auto

import torch
from torch import Tensor


class Need(Flag):
    """What a method asks the host to capture. ``PROJECTED`` is always there."""

    PROJECTED = auto()
    ENCODER = auto()
    KEYS = auto()
    SALIENCY = auto()
    TEXT = auto()


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """The visual tokens of one group: an image, a crop, or a block of frames.

    Args:
        projected: ``(N, D)`` tokens after the projector or merger, as the language model would get them.
        grid: ``(t, h, w)`` with ``t * h * w == N``; tokens are in raster order.
        saliency: ``(N,)`` attention each token gets: from CLS (mean over heads), or the mean over all queries
            where the tower has no CLS token. Not normalised.
        encoder: ``(N, Dv)`` tokens before the projector.
        keys: ``(N, Dk)`` attention keys of the layer that saliency comes from.
        text: ``(M, D)`` language-model embeddings of the user's text, for prompt-aware methods.
        entropy: 0-d, the entropy of a larger view of the same image, to be used in place of this group's own.

    Raises:
        ValueError: When shapes contradict each other.
    """

    projected: Tensor
    grid: tuple[int, int, int]
    saliency: Tensor | None = None
    encoder: Tensor | None = None
    keys: Tensor | None = None
    text: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        if self.projected.ndim != 2 or self.projected.shape[0] < 1:
            raise ValueError(f"projected must be (N, D) with N >= 1, got {tuple(self.projected.shape)}")
        if not self.projected.is_floating_point():
            raise ValueError(f"projected must be floating point, got {self.projected.dtype}")
        n = self.projected.shape[0]
        t, h, w = self.grid
        if t * h * w != n:
            raise ValueError(f"grid {self.grid} holds {t * h * w} tokens, projected has {n}")
        if self.saliency is not None and tuple(self.saliency.shape) != (n,):
            raise ValueError(f"saliency must be ({n},), got {tuple(self.saliency.shape)}")
        for name in ("encoder", "keys"):
            rows: Tensor | None = getattr(self, name)
            if rows is not None and (rows.ndim != 2 or rows.shape[0] != n):
                raise ValueError(f"{name} must be ({n}, width), got {tuple(rows.shape)}")
        if self.entropy is not None and self.entropy.ndim != 0:
            raise ValueError(f"entropy must be a single number, got {tuple(self.entropy.shape)}")
        if self.text is not None and (self.text.ndim != 2 or self.text.shape[1] != self.projected.shape[1]):
            raise ValueError(
                f"text must be (M, {self.projected.shape[1]}) like projected, got {tuple(self.text.shape)}"
            )

    @property
    def tokens(self) -> int:
        """Number of visual tokens N."""
        return int(self.projected.shape[0])

    @property
    def has(self) -> Need:
        """Everything this group carries."""
        present = Need.PROJECTED
        for need, value in (
            (Need.ENCODER, self.encoder),
            (Need.KEYS, self.keys),
            (Need.SALIENCY, self.saliency),
            (Need.TEXT, self.text),
        ):
            if value is not None:
                present |= need
        return present

    def take(self, rows: Tensor, grid: tuple[int, int, int]) -> VisionFeatures:
        """Return the features of some tokens.

        Args:
            rows: ``(m,)`` int64, which of the N, strictly increasing.
            grid: Of the m tokens.
        """
        rows = rows.to(self.projected.device)
        chosen = {name: value[rows] for name in _PER_TOKEN if (value := getattr(self, name)) is not None}
        return replace(self, grid=grid, **chosen)

    @classmethod
    def join(cls, groups: Sequence[VisionFeatures]) -> VisionFeatures:
        """Return the tokens of several groups one after the other, as a single line."""
        first = groups[0]
        together = {
            name: torch.cat([getattr(group, name) for group in groups])
            for name in _PER_TOKEN
            if getattr(first, name) is not None
        }
        return replace(first, grid=(1, 1, sum(group.tokens for group in groups)), **together)


_PER_TOKEN = ("projected", "saliency", "encoder", "keys")
