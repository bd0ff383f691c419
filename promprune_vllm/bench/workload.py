"""Synthetic images for the selection benchmarks, with our selection and the plain procedure.

``mu`` is set from the float64 entropy so that about a quarter of the budget goes to saliency; otherwise stage 2
would have nothing or everything to do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from promprune_vllm.bench import plain, spectra
from promprune_vllm.core.features import VisionFeatures
from promprune_vllm.core.select import select, select_many
from promprune_vllm.kernels import torch_ops

TAU = 0.02
_QUARTER = 1.0986122886681098  # ln 3: the logit of 3/4, the share that goes to coverage


@dataclass(frozen=True, slots=True)
class Images:
    """Images of one shape that are pruned in one call, like the crops of one image.

    Args:
        tokens: ``(N, D)`` features of each image.
        saliency: ``(N,)`` saliency, shared by all images.
        mu: See ``PromPrune``.
    """

    tokens: list[Tensor]
    saliency: Tensor
    mu: float

    @classmethod
    def generate(cls, count: int, n: int, d: int, dtype: torch.dtype, device: torch.device) -> Images:
        """Return images of the family ``spectra.TIMED``, with seeds 0 ... count - 1."""
        tokens = [spectra.features(spectra.TIMED, n, d, seed).to(device, dtype) for seed in range(count)]
        entropies = [float(torch_ops.spectral_entropy(x)) for x in tokens]
        saliency = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(device)
        return cls(tokens, saliency, sum(entropies) / count - TAU * _QUARTER)

    def with_saliency(self, saliency: Tensor) -> Images:
        """Return the same images with another saliency."""
        return replace(self, saliency=saliency)

    def select(self, keep: int) -> list[Tensor]:
        """Return ``(keep,)`` kept tokens of each image, by PromPrune on the kernels' path in force."""
        n = len(self.saliency)
        groups = [VisionFeatures(projected=x, grid=(1, 1, n), saliency=self.saliency) for x in self.tokens]
        selections = select_many(groups, [keep] * len(groups), "promprune", mu=self.mu, tau=TAU)
        return [selection.indices for selection in selections]

    def select_of_clip(self, keep: int) -> Tensor:
        """Return ``keep`` tokens per image, of images that are the frames of a video, by ``promprune-video``."""
        count, n = len(self.tokens), len(self.saliency)
        rows = max(side for side in range(1, int(n**0.5) + 1) if n % side == 0)
        clip = VisionFeatures(
            projected=torch.cat(self.tokens),
            grid=(count, rows, n // rows),
            saliency=self.saliency.repeat(count),
        )
        return select(clip, keep * count, "promprune-video", mu=self.mu, tau=TAU).indices

    def select_by(self, method: str, keep: int) -> list[Tensor]:
        """Return ``(keep,)`` kept tokens of each image, by a method that needs nothing but the tokens."""
        groups = [VisionFeatures(projected=x, grid=(1, 1, len(x))) for x in self.tokens]
        return [selection.indices for selection in select_many(groups, [keep] * len(groups), method)]

    def select_plain(self, keep: int) -> list[Tensor]:
        """Return ``(keep,)`` kept tokens of each image, by the plain procedure."""
        with self.saliency.device:
            return [plain.select(x, self.saliency, keep, self.mu, TAU) for x in self.tokens]
