"""The cells of an image's grid that its kept tokens come from, as extra channels of their embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS = 7
"""Extra channels of a pruned image's rows: row and column in the grid, and an offset in the video.

They are digits in base 256: two, two and three. Most rows are counted from a position that the prompt already has
in their token's place. Of a video that is one run of tokens, the prompt knows only where the run starts: its rows
also have an offset from there. Its digits are of one more than the offset, and 0 for rows without one.

Rows that are sent to another engine all have them: vLLM measures one width, and connectors make room for it.
"""
_BASE = 256  # the largest base whose digits are exact in bfloat16
UNCHANGED = -1.0  # value of every channel where the position is already right


def encode_cells(rows: Tensor, row: Tensor, column: Tensor, offset: Tensor) -> Tensor:
    """Append to each embedding its row and column in the grid, and its offset from the start of its run.

    Args:
        rows: ``(K, W)`` embeddings.
        row, column: ``(K,)`` int64.
        offset: ``(K,)`` int64; -1 for what is counted from its own token's position.

    Returns:
        ``(K, W + CHANNELS)``.
    """
    pairs = [digit for value in (row, column) for digit in (value // _BASE, value % _BASE)]
    stored = offset + 1
    triple = [stored // _BASE**2, stored // _BASE % _BASE, stored % _BASE]
    digits = torch.stack([*pairs, *triple], dim=1)
    return torch.cat([rows, digits.to(rows.dtype)], dim=1)


def decode_cells(digits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows, columns and offsets ``(K,)`` int64 of ``(K, CHANNELS)`` digits.

    Rows and columns are negative where nothing changes.
    """
    d = digits.long()
    offset = (d[:, 4] * _BASE + d[:, 5]) * _BASE + d[:, 6] - 1
    return d[:, 0] * _BASE + d[:, 1], d[:, 2] * _BASE + d[:, 3], offset


def write_cells(
    positions: Tensor, starts: Tensor, media: Tensor, digits: Tensor, *, in_time_only: bool = False
) -> Tensor:
    """Return positions in which the first R image and video tokens have those of their cells.

    No shape depends on a value: on a GPU, the host would wait for it.

    Args:
        positions: ``(3, L)`` int64. Those in time are right for tokens whose rows have no offset.
        starts: ``(L,)`` int64, of video tokens: the position that offsets are counted from.
        media: ``(L,)`` bool, image and video tokens.
        digits: ``(R, CHANNELS)``; see ``decode_cells``.
        in_time_only: Whether offsets do not move a row in height and width.
    """
    number = media.cumsum(dim=0) - 1  # of an image or video token among them
    in_chunk = media & (number < len(digits))
    row, column, offset = (cell[number.clamp(0, len(digits) - 1)] for cell in decode_cells(digits))
    changed = in_chunk & (row >= 0)
    time, height, width = positions
    start = torch.where(offset >= 0, starts, time)
    ahead = offset.clamp(min=0)
    corner = start if in_time_only else start + ahead
    cells = ((start + ahead, time), (corner + row, height), (corner + column, width))
    return torch.stack([torch.where(changed, cell, before) for cell, before in cells])


def starts_of_runs(time: Tensor, in_run: Tensor) -> Tensor:
    """Return the position behind the last token before each run of tokens; of other tokens, their own.

    Args:
        time: ``(L,)`` int64, positions in time of a prompt; those of tokens in no run are right.
        in_run: ``(L,)`` bool.
    """
    places = torch.arange(len(time), device=time.device)
    before = torch.where(in_run, -1, places).cummax(dim=0).values  # -1: the run begins the prompt
    return torch.where(in_run, torch.where(before >= 0, time[before.clamp(min=0)] + 1, 0), time)
