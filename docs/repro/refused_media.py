"""vLLM 0.33: two images that a server refuses on purpose get HTTP 500, since the exception is no ``ValueError``.

A server answers HTTP 400 only to a ``ValueError``.

    python refused_media.py     # exits with 1 where one of them is not
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Callable

os.environ.update(VLLM_PLUGINS="")  # stock vLLM

from vllm.multimodal.media import ImageMediaIO, MediaConnector


def huge_png() -> bytes:
    """Return a black image of 20,000 x 20,000 pixels in 50 kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = 20_000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(side * (1 + side // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def main() -> int:
    """Load both as a server does."""
    refusals: dict[str, Callable[[], object]] = {
        "400 million pixels": lambda: ImageMediaIO().load_bytes(huge_png()),
        "a file, with no path allowed": lambda: MediaConnector().fetch_image("file:///etc/hostname"),
    }
    wrong = 0
    for name, load in refusals.items():
        try:
            load()
        except Exception as error:
            wrong += not isinstance(error, ValueError)
            print(f"{name}: {type(error).__name__}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
