"""The input of a method: the visual tokens of one group, with what was captured in the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Flag, auto

import torch
from torch import Tensor


class Need(Flag):
    """What a method needs captured, by field of ``VisionFeatures``. ``PROJECTED`` is always there."""

    PROJECTED = auto()
    ENCODER = auto()
    KEYS = auto()
    SALIENCY = auto()
    TEXT = auto()


OF_TOWER = Need.ENCODER | Need.KEYS | Need.SALIENCY
"""What is captured inside the vision tower; the rest is there without it."""


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """The visual tokens of one group: an image, a crop, or a block of frames.

    Args:
        projected: ``(N, D)`` tokens after the projector or merger, as the language model would get them.
        grid: ``(t, h, w)`` with ``t * h * w == N``; tokens are in raster order.
        saliency: ``(N,)`` attention each token receives: from CLS (mean over heads), or the mean over all
            queries if the tower has no CLS token. Not normalized.
        encoder: ``(N, Dv)`` tokens before the projector.
        keys: ``(N, Dk)`` attention keys of the layer that saliency comes from.
        text: ``(M, D)`` language-model embeddings of the user's text, for prompt-aware methods.
        entropy: 0-d entropy of a larger view of the same image, used instead of this group's own.

    Raises:
        ValueError: The shapes contradict each other.
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
        """The features that are present."""
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
        """Return the features of a subset of the tokens.

        Args:
            rows: ``(m,)`` int64 indices of the tokens, strictly increasing.
            grid: Grid of the m tokens.
        """
        rows = rows.to(self.projected.device)
        subset = {name: value[rows] for name in _PER_TOKEN if (value := getattr(self, name)) is not None}
        return replace(self, grid=grid, **subset)

    def frames(self) -> list[VisionFeatures]:
        """Return the features of each frame of a video, which share its memory."""
        count, rows, columns = self.grid
        cells = [slice(frame * rows * columns, (frame + 1) * rows * columns) for frame in range(count)]
        values = {name: value for name in _PER_TOKEN if (value := getattr(self, name)) is not None}
        return [
            replace(self, grid=(1, rows, columns), **{name: value[part] for name, value in values.items()})
            for part in cells
        ]

    @classmethod
    def join(cls, groups: Sequence[VisionFeatures]) -> VisionFeatures:
        """Concatenate the tokens of several groups into one group whose grid is a single row."""
        first = groups[0]
        concatenated = {
            name: torch.cat([getattr(group, name) for group in groups])
            for name in _PER_TOKEN
            if getattr(first, name) is not None
        }
        return replace(first, grid=(1, 1, sum(group.tokens for group in groups)), **concatenated)


_PER_TOKEN = ("projected", "saliency", "encoder", "keys")
