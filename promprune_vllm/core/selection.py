"""The outcome of a method, and the check of what every outcome must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tokens stay.

    Args:
        indices: ``(K,)`` int64, strictly increasing: raster order, no duplicates.
        rows: ``(K, width)`` where a method merges tokens into the kept ones; ``None`` means plain gathering.
            Row i stands at the place of token ``indices[i]``.
        space: Which features the rows are made of, and so how wide they are. ``PROJECTED`` rows enter the
            language model as they are; ``ENCODER`` rows were merged before the projector, and the host
            projects them. Of no meaning without rows.
        report: 0-d tensors on the device of the features, such as ``spectral_entropy`` and
            ``saliency_tokens``.
    """

    indices: Tensor
    rows: Tensor | None = None
    space: Need = Need.PROJECTED
    report: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))


def check_selection(selection: Selection, features: VisionFeatures, keep: int, method: str) -> None:
    """Raise ``RuntimeError`` if a method broke the contract of ``Selection``.

    Values are looked at on the CPU only: on an accelerator that would stall the device for every image, and
    the shapes alone already keep the placeholder and the rows in step.
    """
    indices, total = selection.indices, features.tokens
    problem = None
    if indices.dtype != torch.int64 or tuple(indices.shape) != (keep,):
        problem = f"indices of {indices.dtype} {tuple(indices.shape)} instead of int64 ({keep},)"
    elif selection.rows is not None and (wrong := _wrong_rows(selection.rows, selection.space, features, keep)):
        problem = wrong
    elif indices.device.type == "cpu":
        if int(indices[0]) < 0 or int(indices[-1]) >= total:
            problem = f"indices outside 0 … {total - 1}"
        elif not bool((indices[1:] > indices[:-1]).all()):
            problem = "indices that are not strictly increasing"
    if problem:
        raise RuntimeError(f"Method {method!r} returned {problem}. This is a bug of the method.")


def _wrong_rows(rows: Tensor, space: Need, features: VisionFeatures, keep: int) -> str | None:
    made_of = {Need.PROJECTED: features.projected, Need.ENCODER: features.encoder}.get(space)
    if made_of is None:
        return f"rows in the space {space.name} of features that are not there or cannot be merged"
    if tuple(rows.shape) != (keep, made_of.shape[1]) or rows.dtype != made_of.dtype:
        wanted = f"{made_of.dtype} ({keep}, {made_of.shape[1]}) like {space.name}"
        return f"merged rows of {rows.dtype} {tuple(rows.shape)} instead of {wanted}"
    return None
