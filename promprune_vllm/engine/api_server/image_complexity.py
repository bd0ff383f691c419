"""The share of the default budget that an image's content needs, computed from the image as vLLM parsed it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from promprune_vllm.core.content_levels import SIDE, busy_share, content_level


def level(image: Any) -> Fraction:
    """Return the share of the default that an image keeps; 1 if there are no pixels.

    Args:
        image: A PIL image, an array or a tensor (channels first or last), or ``None`` for an image that the
            request only names by its uuid.
    """
    return Fraction(1) if image is None else content_level(busy_share(sample_brightness(image)))


def sample_brightness(image: Any) -> torch.Tensor:
    """Return ``(SIDE, SIDE)`` uint8: the brightness of evenly spaced pixels."""
    from PIL import Image

    if isinstance(image, Image.Image):
        small = image.resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("L")
        return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(SIDE, SIDE)
    pixels = image if isinstance(image, torch.Tensor) else torch.tensor(image)
    if pixels.shape[-1] not in (1, 3, 4):
        pixels = pixels.movedim(0, -1)  # channels first, by the rule of vLLM's get_image_size
    rows, columns = (((torch.arange(SIDE) + 0.5) * side / SIDE).long() for side in pixels.shape[:2])
    brightness = pixels[rows][:, columns][..., :3].double().mean(-1)
    if pixels.is_floating_point():
        brightness = brightness * 255  # floating-point images range from 0 to 1
    return brightness.clamp(0, 255).to(torch.uint8)
