"""The outcome of a method, and the one place that owns the edges and checks the invariants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.errors import BudgetError, SettingsError

if TYPE_CHECKING:
    from promprune_vllm.core.registry import Selector


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


def select(features: VisionFeatures, keep: int, method: str | Selector = "promprune", **options: Any) -> Selection:
    """Choose which ``keep`` of an image's N visual tokens stay.

    Args:
        features: The tokens of one group, ``(N, D)`` and what else the method needs.
        keep: Tokens to keep, at least 1; ``keep >= N`` keeps all.
        method: A name of ``methods()``, or a method with its options set.
        options: Options of the named method.

    Returns:
        Exactly ``min(keep, N)`` tokens. Deterministic: the same input gives the same set.

    Raises:
        BudgetError: ``keep`` is not a positive integer.
        UnknownMethodError, SettingsError: See ``get_method``.
        ValueError: The features lack something the method needs.
    """
    return select_many([features], [keep], method, **options)[0]


def select_many(
    groups: Sequence[VisionFeatures], keeps: Sequence[int], method: str | Selector = "promprune", **options: Any
) -> list[Selection]:
    """Choose from several groups, such as the crops of one image: each as ``select`` does.

    A method that can takes groups of one shape in the same launches on an accelerator.

    Args:
        groups: Each with what the method needs.
        keeps: How many tokens to keep of each.
        method, options: See ``select``.

    Raises:
        As ``select``; ``ValueError`` also if there are not as many ``keeps`` as groups.
    """
    if len(groups) != len(keeps):
        raise ValueError(f"{len(groups)} groups need as many numbers of tokens to keep, not {len(keeps)}")
    counts = [_count(keep) for keep in keeps]
    selector = _resolve(method, options)
    found: dict[int, Selection] = {}
    pruned: list[int] = []
    for number, (features, keep) in enumerate(zip(groups, counts, strict=True)):
        if keep >= features.tokens:
            found[number] = Selection(torch.arange(features.tokens, device=features.projected.device))
        elif missing := selector.needs & ~features.has:
            raise ValueError(
                f"Method {selector.name!r} needs {missing.name} and the features do not carry it. "
                "Pass it in VisionFeatures, or choose another method."
            )
        else:
            pruned.append(number)
    asked = [groups[i] for i in pruned], [counts[i] for i in pruned]
    at_once = getattr(selector, "select_many", None)
    chosen = at_once(*asked) if at_once else map(selector.select, *asked)
    for number, selection in zip(pruned, chosen, strict=True):
        check_selection(selection, groups[number], counts[number], selector.name)
        found[number] = selection
    return [found[number] for number in range(len(groups))]


def _count(keep: SupportsIndex) -> int:
    if isinstance(keep, bool) or not isinstance(keep, SupportsIndex) or (count := index(keep)) < 1:
        raise BudgetError(f"keep must be a positive integer, got {keep!r}.", param="keep")
    return count


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


def _resolve(method: str | Selector, options: Mapping[str, Any]) -> Selector:
    if isinstance(method, str):
        from promprune_vllm.core.registry import get_method

        return get_method(method, **options)
    if options:
        raise SettingsError("Options belong to a method given by name; this one is already set up.")
    return method
