"""Short videos made by code, as arrays, as files and as the URLs that clients send."""

from __future__ import annotations

import base64
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Frames = npt.NDArray[np.uint8]

CLIP_SHAPES = {"landscape": (140, 84), "portrait": (84, 140), "tall": (168, 252)}
"""Width and height of a frame in pixels: 15 visual tokens of 28 x 28 pixels, or 12 of 32 x 32.

A short tall clip has more visual tokens than the tiny tokenizers make of the text between two frames.
"""
FPS = 2.0  # at which Qwen3-VL and GLM sample: whoever samples such a clip finds each of its frames


@dataclass(frozen=True)
class Clip:
    """A bright square crosses a patterned background that stands still; a large disc is in the middle frame only.

    Args:
        frames: Number of frames, at least 1. Some families refuse a clip of one.
        shape: A key of ``CLIP_SHAPES``.
    """

    frames: int
    shape: str = "landscape"

    @property
    def pixels(self) -> Frames:
        """``(T, H, W, 3)`` red, green and blue; the same bytes on any machine."""
        return _drawn(self.frames, *CLIP_SHAPES[self.shape])

    @property
    def item(self) -> tuple[Frames, dict[str, Any]]:
        """What vLLM's ``multi_modal_data`` takes as one video of any family: all frames, none sampled again."""
        return self.pixels, {
            "fps": FPS,
            "duration": self.frames / FPS,
            "total_num_frames": self.frames,
            "frames_indices": list(range(self.frames)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }

    def mp4(self) -> bytes:
        """A file with ``FPS`` frames per second, whose encoder loses a little. vLLM reads none of one frame."""
        import cv2

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, CLIP_SHAPES[self.shape])
            assert writer.isOpened(), "this build of OpenCV cannot write MPEG-4"
            for frame in self.pixels:
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            writer.release()
            return path.read_bytes()

    def mp4_url(self) -> str:
        """``data:video/mp4;base64,...``: vLLM decodes it, and samples frames of it."""
        return f"data:video/mp4;base64,{base64.b64encode(self.mp4()).decode()}"

    def frames_url(self) -> str:
        """``data:video/jpeg;base64,<frame>,<frame>...``: vLLM takes 32 and one per second, unless told."""
        return f"data:video/jpeg;base64,{','.join(map(_jpeg, self.pixels))}"


def _drawn(count: int, width: int, height: int) -> Frames:
    y, x = np.mgrid[:height, :width]
    pattern = (x * 37 + y * 61 + x * y * 17) % 97
    background = np.stack([pattern + 20, pattern // 2 + x * 60 // width, y * 90 // height], axis=-1)
    frames = np.repeat(background[None], count, axis=0).astype(np.uint8)
    side = min(width, height) // 4
    for at, frame in enumerate(frames):
        left = (width - side) * at // max(count - 1, 1)
        frame[side : 2 * side, left : left + side] = (250, 245, 200)
    inside = (x - width // 2) ** 2 + (y - height // 2) ** 2 < (min(width, height) * 2 // 5) ** 2
    frames[count // 2, inside] = (30, 60, 240)
    return frames


def _jpeg(frame: Frames) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()
