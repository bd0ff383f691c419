"""The cases that the kernel benchmarks measure, and a switch for the kernels' path."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from promprune_vllm.kernels import ops

LARGE = 4096
"""Cases with more tokens than this run once: they take minutes rather than milliseconds."""


CLIP = 16
"""A case with this many images or more is also measured as a video, whose frames share the tokens of all."""


@dataclass(frozen=True, slots=True)
class Case:
    """``images`` images of N tokens of width D; K tokens of each are kept."""

    images: int
    n: int
    d: int
    keep: int

    def __str__(self) -> str:
        prefix = f"{self.images}x" if self.images > 1 else ""
        return f"{prefix}{self.n}x{self.d}:{self.keep}"

    @property
    def is_clip(self) -> bool:
        """Whether the images may as well be the frames of a video."""
        return self.images >= CLIP

    @property
    def needs(self) -> int:
        """Approximate peak bytes of the float64 reference: the features twice, and five N x N matrices."""
        return 8 * (2 * self.n * self.d + 5 * self.n * self.n)


STANDARD = (
    *(Case(1, 576, 4096, keep) for keep in (32, 64, 128, 256, 512)),
    Case(5, 576, 4096, 64),
    *(Case(1, 1296, 3584, keep) for keep in (256, 512)),
    Case(64, 256, 3584, 32),  # a clip of 64 frames: promprune-video is timed too
)


def cases(names: Sequence[str] | None, *, large: bool) -> list[Case]:
    """Return the cases to run: the named ones, or the standard ones.

    Raises:
        ValueError: A name is not of the form NxD:K or IMAGESxNxD:K, or K is outside 1 ... N - 1.
    """
    if not names:
        return [*STANDARD, *([Case(1, 16384, 3584, 512)] if large else [])]
    parsed = []
    for text in names:
        shape, _, keep = text.partition(":")
        try:
            *more, n, d = (int(part) for part in shape.split("x"))
            (images,) = more or [1]
            case = Case(images, n, d, int(keep))
        except ValueError:
            raise ValueError(f"--case must be NxD:K or IMAGESxNxD:K, such as 576x4096:64, got {text!r}") from None
        if not 1 <= case.keep < case.n or min(case.images, case.d) < 1:
            raise ValueError(f"--case {text}: K must be from 1 to N - 1, and every number at least 1")
        parsed.append(case)
    return parsed


@contextlib.contextmanager
def use_path(name: str) -> Iterator[None]:
    """Use a path of the kernels inside the block."""
    before = os.environ.get(ops.VARIABLE)
    os.environ[ops.VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(ops.VARIABLE)
        if before is not None:
            os.environ[ops.VARIABLE] = before
