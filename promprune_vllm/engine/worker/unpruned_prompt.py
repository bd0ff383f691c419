"""The unpruned prompt that a pruned one stands for, as far as positions depend on it: tokens and features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """A run of embeddings in a prompt: an image, one of the frames of a video, or a whole video.

    Args:
        offset: Index of its first token in the pruned prompt.
        kept: Tokens after pruning; a frame of a video may keep none.
        total: Tokens before pruning.
        token: What its visual tokens are in the prompt.
        layout: Its tokens before pruning, if there is text among them.
    """

    offset: int
    kept: int
    total: int
    token: int
    layout: Sequence[int] = ()


def unpruned_columns(length: int, spans: Sequence[Span]) -> Tensor:
    """Return the index in the unpruned prompt of each token of a pruned prompt.

    Args:
        length: Tokens of the pruned prompt.
        spans: Its runs, by offset. Which tokens a run keeps is not known yet, so its first ones are used.

    Returns:
        ``(length,)`` int64, strictly increasing.
    """
    dropped = torch.zeros(length + 1, dtype=torch.int64)  # before each token, since the one before it
    for span in spans:
        dropped[span.offset + span.kept] += span.total - span.kept
    return torch.arange(length) + dropped.cumsum(dim=0)[:length]


def unpruned_tokens(tokens: list[int], spans: Sequence[Span]) -> list[int]:
    """Return the tokens of the unpruned prompt."""
    unpruned: list[int] = []
    done = 0
    for span in spans:
        unpruned += tokens[done : span.offset] + list(span.layout or [span.token] * span.total)
        done = span.offset + span.kept
    return unpruned + list(tokens[done:])


def unpruned_feature(feature: Any, own: Sequence[Span], before: Sequence[Span]) -> Any:
    """Return a feature with the placeholder that it has in the unpruned prompt.

    Args:
        feature: vLLM's feature.
        own: Its runs, if it is pruned.
        before: The runs of the features before it.
    """
    placeholder = feature.mm_position
    dropped_before = sum(span.total - span.kept for span in before)
    moved = replace(placeholder, offset=placeholder.offset + dropped_before)
    if own:
        mask = placeholder.is_embed
        dropped = sum(span.total - span.kept for span in own)
        moved = replace(moved, length=placeholder.length + dropped)
        if mask is not None:
            moved = replace(moved, is_embed=_unpruned_mask(mask, placeholder.offset, own))
    return replace(feature, mm_position=moved)


def _unpruned_mask(mask: Tensor, offset: int, spans: Sequence[Span]) -> Tensor:
    """Return which tokens of a placeholder in the unpruned prompt are visual."""
    parts, done = [], 0
    for span in spans:
        run = mask.new_tensor([token == span.token for token in span.layout]) if span.layout else None
        parts += [mask[done : span.offset - offset], mask.new_ones(span.total) if run is None else run]
        done = span.offset - offset + span.kept
    return torch.cat([*parts, mask[done:]])
