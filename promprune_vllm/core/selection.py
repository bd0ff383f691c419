"""The result of a method, and the check that every result meets the contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures


@dataclass(frozen=True, slots=True)
class Selection:
    """The kept tokens.

    Args:
        indices: ``(K,)`` int64 indices of the kept tokens, strictly increasing: raster order, no duplicates.
        rows: ``(K, width)`` embeddings, if the method merges tokens into the kept ones. Row i takes the position
            of token ``indices[i]``. ``None``: the tokens' own embeddings are used.
        space: Features the rows are made of, and so their width. ``PROJECTED`` rows enter the language model
            as they are; ``ENCODER`` rows were merged before the projector and still have to be projected.
            Meaningless without rows.
        report: 0-d tensors on the device of the features, such as ``spectral_entropy`` and
            ``saliency_tokens``.
    """

    indices: Tensor
    rows: Tensor | None = None
    space: Need = Need.PROJECTED
    report: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))


def check_selection(selection: Selection, features: VisionFeatures, keep: int, method: str) -> None:
    """Raise ``RuntimeError`` if a method broke the contract of ``Selection``.

    Values are checked on the CPU only: on an accelerator that would stall the device for every image. The shapes
    alone ensure that the placeholder and the rows match.
    """
    indices, total = selection.indices, features.tokens
    problem = None
    if indices.dtype != torch.int64 or tuple(indices.shape) != (keep,):
        problem = f"indices of {indices.dtype} {tuple(indices.shape)} instead of int64 ({keep},)"
    elif selection.rows is not None and (
        rows_problem := _rows_problem(selection.rows, selection.space, features, keep)
    ):
        problem = rows_problem
    elif indices.device.type == "cpu":
        if int(indices[0]) < 0 or int(indices[-1]) >= total:
            problem = f"indices outside 0 … {total - 1}"
        elif not bool((indices[1:] > indices[:-1]).all()):
            problem = "indices that are not strictly increasing"
    if problem:
        raise RuntimeError(f"Method {method!r} returned {problem}. This is a bug in the method.")


def _rows_problem(rows: Tensor, space: Need, features: VisionFeatures, keep: int) -> str | None:
    source = {Need.PROJECTED: features.projected, Need.ENCODER: features.encoder}.get(space)
    if source is None:
        return f"rows in the space {space.name}, whose features are missing or cannot be merged"
    if tuple(rows.shape) != (keep, source.shape[1]) or rows.dtype != source.dtype:
        expected = f"{source.dtype} ({keep}, {source.shape[1]}) like {space.name}"
        return f"merged rows of {rows.dtype} {tuple(rows.shape)} instead of {expected}"
    return None
