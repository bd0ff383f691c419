"""M-RoPE positions of a prompt can run ahead of its tokens: checks that they stay within the rotary table.

A pruned image uses as many positions as unpruned, one for each step along its longer side, however few tokens it
keeps; the text after it continues from there. The model looks every position up in a table, and a position past
the table's end would kill the engine. This depends on sizes only, so it is checked before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence

from promprune_vllm.core.budget import FIELD
from promprune_vllm.errors import BudgetError

ROWS_PER_TOKEN = 4
"""Table rows per token of ``max_model_len``. vLLM also uses four where positions can outrun tokens."""

Taken = tuple[int, int]
"""An image's longer side, in tokens of its unpruned grid, and the number of tokens it keeps."""


def table_rows(max_model_len: int) -> int:
    """Return the number of positions, counted from 0, that a pruned model can look up."""
    return ROWS_PER_TOKEN * max_model_len


def require_rows(images: Sequence[Taken], max_model_len: int) -> None:
    """Refuse images with which a position could pass the end of the table before the context is full.

    Each text token uses one position. So after ``max_model_len`` tokens, prompt and generated, the next position
    is ``max_model_len`` plus the positions the images use beyond the tokens they keep.

    Args:
        images: All images of one prompt. An image that keeps every token uses no more positions than tokens.
        max_model_len: Maximum tokens of a request, prompt and generated.

    Raises:
        BudgetError: A position could pass the end. The message gives the positions, the limit and the next step.
    """
    taken, kept = (sum(column) for column in zip(*images, strict=True)) if images else (0, 0)
    needed, rows = max_model_len + taken - kept, table_rows(max_model_len)
    if needed > rows:
        raise BudgetError(
            f"{FIELD} keeps {kept} tokens of {len(images)} images or videos that still use {taken} positions: "
            f"with --max-model-len {max_model_len} the positions could reach {needed}, and the limit is {rows} "
            f"({ROWS_PER_TOKEN} per token). Keep more tokens of each, or send fewer or smaller ones.",
            reason="limits",
        )
