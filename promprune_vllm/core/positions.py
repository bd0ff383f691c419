"""How far the positions of a prompt with M-RoPE run ahead of its tokens, and where that is too far.

A pruned image takes as many positions as it took unpruned, one for each step along its longer side, however few of
its tokens are kept; what follows goes on behind them. The model looks every position up in a table, and one past
the table's end would end the engine. All of this follows from sizes, so it is known before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence

from promprune_vllm.core.budget import FIELD
from promprune_vllm.errors import BudgetError

ROWS_PER_TOKEN = 4
"""Rows of the table for each token of ``max_model_len``. vLLM takes four, too, where positions outrun tokens."""

Taken = tuple[int, int]
"""An image's longer side, in tokens of its unpruned grid, and the tokens that it keeps."""


def table_rows(max_model_len: int) -> int:
    """Return how many positions a model that prunes can look up: those from 0 up to this number."""
    return ROWS_PER_TOKEN * max_model_len


def require_rows(images: Sequence[Taken], max_model_len: int) -> None:
    """Refuse images with which a position could lie past the table, at the latest when the context is full.

    Text takes one position a token. So after ``max_model_len`` tokens, of the prompt and generated, the next
    position is ``max_model_len`` plus what the images took beyond the tokens they keep.

    Args:
        images: Of one prompt, all of them; one that keeps every token takes no more positions than tokens.
        max_model_len: Tokens that a request may have in all.

    Raises:
        BudgetError: With the positions, the limit and the next step.
    """
    taken, kept = (sum(column) for column in zip(*images, strict=True)) if images else (0, 0)
    needed, rows = max_model_len + taken - kept, table_rows(max_model_len)
    if needed > rows:
        raise BudgetError(
            f"{FIELD} leaves {kept} tokens of {len(images)} image(s) that still take {taken} positions: with "
            f"--max-model-len {max_model_len} the positions could reach {needed}, and the limit is {rows} "
            f"({ROWS_PER_TOKEN} for each token). Keep more tokens of each image, or send fewer or smaller images.",
            reason="limits",
        )
