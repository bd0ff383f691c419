"""The cells of an image's grid that its kept tokens come from, as extra channels of their embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS = 7
"""Extra channels of a pruned image's rows: row and column in the grid, and the frame's offset in time.

They are two digits in base 256, two and three. The offset is how far in time a frame is behind the first of its
video, if the video is one run of tokens: in Qwen2-VL and Qwen2.5-VL. Elsewhere each frame has a start of its own.

Rows that are sent to another engine all have them: vLLM measures one width, and connectors make room for it.
"""
_BASE = 256  # the largest base whose digits are exact in bfloat16
UNCHANGED = -1.0  # value of every channel where the position is already right


def encode_cells(rows: Tensor, row: Tensor, column: Tensor, offset: Tensor) -> Tensor:
    """Append to each embedding its row and column in the grid, and its frame's offset in time.

    Args:
        rows: ``(K, W)`` embeddings.
        row, column, offset: ``(K,)`` int64.

    Returns:
        ``(K, W + CHANNELS)``.
    """
    pairs = [digit for value in (row, column) for digit in (value // _BASE, value % _BASE)]
    triple = [offset // _BASE**2, offset // _BASE % _BASE, offset % _BASE]
    digits = torch.stack([*pairs, *triple], dim=1)
    return torch.cat([rows, digits.to(rows.dtype)], dim=1)


def decode_cells(digits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows, columns and offsets ``(K,)`` int64 of ``(K, CHANNELS)`` digits.

    They are negative where nothing changes.
    """
    d = digits.long()
    return d[:, 0] * _BASE + d[:, 1], d[:, 2] * _BASE + d[:, 3], (d[:, 4] * _BASE + d[:, 5]) * _BASE + d[:, 6]


def write_cells(positions: Tensor, starts: Tensor, media: Tensor, digits: Tensor) -> Tensor:
    """Return positions in which the first R image and video tokens have those of their cells.

    No shape depends on a value: on a GPU, the host would wait for it.

    Args:
        positions: ``(3, L)`` int64.
        starts: ``(L,)`` int64, of image and video tokens: the position that their cells are counted from.
        media: ``(L,)`` bool, image and video tokens.
        digits: ``(R, CHANNELS)``; see ``decode_cells``.
    """
    number = media.cumsum(dim=0) - 1  # of an image or video token among them
    in_chunk = media & (number < len(digits))
    row, column, offset = (cell[number.clamp(0, len(digits) - 1)] for cell in decode_cells(digits))
    changed = in_chunk & (row >= 0)
    time, height, width = positions
    cells = ((offset, time), (row, height), (column, width))
    return torch.stack([torch.where(changed, starts + cell, before) for cell, before in cells])


def starts_of_runs(time: Tensor, in_run: Tensor) -> Tensor:
    """Return the position behind the last token before each run of tokens; of other tokens, their own.

    Args:
        time: ``(L,)`` int64, positions in time of a prompt; those of tokens in no run are right.
        in_run: ``(L,)`` bool.
    """
    places = torch.arange(len(time), device=time.device)
    before = torch.where(in_run, -1, places).cummax(dim=0).values  # -1: the run begins the prompt
    return torch.where(in_run, torch.where(before >= 0, time[before.clamp(min=0)] + 1, 0), time)
