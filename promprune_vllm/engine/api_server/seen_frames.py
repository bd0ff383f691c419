"""The frames of a video as the model gets them: sampled, resized and cut into a grid of tokens.

They are read back from what the Hugging Face processor made, so nothing is sampled or resized a second time here.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from promprune_vllm.core import geometry

_PICTURE_PX = 384
"""Longer side of a picture at most: 64 of them have one or two megabytes."""


@dataclass(frozen=True, slots=True)
class SeenFrames:
    """The frames of one video.

    Args:
        pixels: ``(T, H, W, 3)`` uint8, red, green and blue.
        grid: Rows and columns of the tokens of each frame.
    """

    pixels: Tensor
    grid: tuple[int, int]

    @classmethod
    def of(cls, values: Tensor, grid: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> SeenFrames:
        """Return frames from a processor's values.

        Args:
            values: ``(T, H, W, 3)``: colors from 0 to 255 if they are integers, which the model normalizes, or
                normalized by the processor.
            grid: Rows and columns of the tokens of each frame.
            mean: Of normalized values, for each color from 0 to 1.
            std: The same.
        """
        if values.is_floating_point():
            colors = values.float() * torch.tensor(std) + torch.tensor(mean)
            values = (255 * colors).round().clamp(0, 255).to(torch.uint8)
        return cls(values, grid)

    @classmethod
    def of_squares(cls, pixels: Tensor, info: Any) -> SeenFrames:
        """Return the frames of a LLaVA's video, each of which is one square of tokens.

        Args:
            pixels: ``(T, 3, H, W)``, normalized by the processor.
            info: The model's ``ProcessingInfo``.
        """
        tokens = info.get_num_video_tokens(image_width=1, image_height=1, num_frames=1)  # of any size
        side = math.isqrt(tokens)  # a newline may be one more
        look = info.get_hf_processor().video_processor
        return cls.of(pixels.permute(0, 2, 3, 1), (side, side), look.image_mean, look.image_std)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame in pixels."""
        _, height, width, _ = self.pixels.shape
        return width, height

    def boxes(self) -> list[geometry.Box]:
        """Return the pixel box of each token of a frame; they are the same in all frames."""
        width, height = self.size
        return geometry.grid(*self.grid, (0.0, 0.0, float(width), float(height)))

    def pictures(self) -> list[str]:
        """Return a ``data:`` URL of each frame, at most 384 pixels wide and high."""
        return [_jpeg_url(frame) for frame in self.pixels]


def _jpeg_url(frame: Tensor) -> str:
    picture = Image.fromarray(frame.numpy())
    picture.thumbnail((_PICTURE_PX, _PICTURE_PX))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
