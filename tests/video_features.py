"""Embeddings of short videos, made by code."""

from __future__ import annotations

import torch

from promprune_vllm import VisionFeatures

KINDS = ("random", "still", "static", "event")


def clip(
    kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> VisionFeatures:
    """Return the features of a clip.

    Args:
        kind: ``random``: frames that have nothing in common. ``still``: one picture with a little noise.
            ``static``: all frames equal. ``event``: ``still``, but the frame in the middle is another picture.
        shape: Frames, rows, columns and width.
        dtype: Type of the features.
        seed: Another seed draws another clip.
    """
    t, h, w, width = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, h * w, width, generator=generator)
    if kind == "static":
        x = x[:1].expand(t, -1, -1)
    elif kind != "random":
        x = x[:1] + 0.02 * x
    if kind == "event":
        x[t // 2] = torch.randn(h * w, width, generator=generator)
    saliency = torch.rand(t * h * w, generator=torch.Generator().manual_seed(seed))
    return VisionFeatures(projected=x.reshape(t * h * w, width).to(dtype), grid=(t, h, w), saliency=saliency)
