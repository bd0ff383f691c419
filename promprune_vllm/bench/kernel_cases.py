"""What the kernels are measured on: cases by their sizes, and which path of the kernels runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from promprune_vllm.kernels import ops

LARGE = 4096
"""Tokens from which everything is run once: minutes rather than milliseconds."""


@dataclass(frozen=True, slots=True)
class Case:
    """``images`` images of N tokens of width D, K of each kept."""

    images: int
    n: int
    d: int
    keep: int

    def __str__(self) -> str:
        prefix = f"{self.images}x" if self.images > 1 else ""
        return f"{prefix}{self.n}x{self.d}:{self.keep}"

    @property
    def needs(self) -> int:
        """Bytes the float64 reference holds at most, about: features twice, and five N x N matrices."""
        return 8 * (2 * self.n * self.d + 5 * self.n * self.n)


STANDARD = (
    *(Case(1, 576, 4096, keep) for keep in (32, 64, 128, 256, 512)),
    Case(5, 576, 4096, 64),
    *(Case(1, 1296, 3584, keep) for keep in (256, 512)),
)


def cases(wanted: Sequence[str] | None, *, large: bool) -> list[Case]:
    """Return the cases to run.

    Raises:
        ValueError: A case of another form than NxD:K or IMAGESxNxD:K, or with K outside 1 ... N - 1.
    """
    if not wanted:
        return [*STANDARD, *([Case(1, 16384, 3584, 512)] if large else [])]
    found = []
    for text in wanted:
        shape, _, keep = text.partition(":")
        try:
            *more, n, d = (int(part) for part in shape.split("x"))
            (images,) = more or [1]
            case = Case(images, n, d, int(keep))
        except ValueError:
            raise ValueError(f"--case is NxD:K or IMAGESxNxD:K, such as 576x4096:64, not {text!r}") from None
        if not 1 <= case.keep < case.n or min(case.images, case.d) < 1:
            raise ValueError(f"--case {text}: K must be from 1 to N - 1, and every number at least 1")
        found.append(case)
    return found


@contextlib.contextmanager
def path(name: str) -> Iterator[None]:
    """Choose the path of the kernels for a while."""
    before = os.environ.get(ops.VARIABLE)
    os.environ[ops.VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(ops.VARIABLE)
        if before is not None:
            os.environ[ops.VARIABLE] = before
