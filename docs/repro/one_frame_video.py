"""vLLM 0.29 to 0.32: a video file with a single frame is read as a video without frames.

``OpenCVVideoBackendMixin.get_video_metadata`` (vllm/multimodal/video_decoders/opencv.py) seeks to the end, to
count the frames again, and back. With one frame, the seek back does not work: OpenCV reads nothing afterwards.

    python one_frame_video.py     # exits with 1 where no frame is read
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.update(VLLM_PLUGINS="")  # stock vLLM

import cv2
import numpy as np
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO


def mp4(frames: int) -> bytes:
    """Return a file with gray frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 4, (96, 64))
        for i in range(frames):
            writer.write(np.full((64, 96, 3), 40 * i, np.uint8))
        writer.release()
        return path.read_bytes()


def main() -> int:
    """Read files with one frame and with two."""
    lost = 0
    for frames in (1, 2):
        video, _ = VideoMediaIO(ImageMediaIO()).load_bytes(mp4(frames))
        lost += len(video) != frames
        print(f"a file of {frames}: {len(video)} read")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
