"""Selection by the name of a method: handles the edge cases, and checks every selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, SupportsIndex

import torch

from promprune_vllm.core.features import VisionFeatures
from promprune_vllm.core.registry import Selector, get_method
from promprune_vllm.core.selection import Selection, check_selection
from promprune_vllm.errors import BudgetError, SettingsError


def select(features: VisionFeatures, keep: int, method: str | Selector = "promprune", **options: Any) -> Selection:
    """Choose which ``keep`` of an image's N visual tokens are kept.

    Args:
        features: The tokens of one group, ``(N, D)``, and whatever else the method needs.
        keep: Tokens to keep, at least 1; ``keep >= N`` keeps all.
        method: A name from ``methods()``, or a method with its options set.
        options: Options of the named method.

    Returns:
        Exactly ``min(keep, N)`` tokens. Deterministic: the same input gives the same set.

    Raises:
        BudgetError: ``keep`` is not a positive integer.
        UnknownMethodError, SettingsError: See ``get_method``.
        ValueError: The features lack something the method needs, or the method compares the frames of a video
            and the grid has one frame.
    """
    return select_many([features], [keep], method, **options)[0]


def select_many(
    groups: Sequence[VisionFeatures], keeps: Sequence[int], method: str | Selector = "promprune", **options: Any
) -> list[Selection]:
    """Select from several groups, such as the crops of one image: each as ``select`` does.

    Methods that support it process groups of one shape in the same kernel launches.

    Args:
        groups: The groups, each with what the method needs.
        keeps: How many tokens to keep of each.
        method, options: See ``select``.

    Raises:
        As ``select``; ``ValueError`` also if ``keeps`` and ``groups`` differ in length.
    """
    if len(groups) != len(keeps):
        raise ValueError(f"{len(groups)} groups need one number of tokens to keep each, got {len(keeps)}")
    counts = [_count(keep) for keep in keeps]
    selector = _resolve(method, options)
    selections: dict[int, Selection] = {}
    pruned: list[int] = []
    for number, (features, keep) in enumerate(zip(groups, counts, strict=True)):
        if keep >= features.tokens:
            selections[number] = Selection(torch.arange(features.tokens, device=features.projected.device))
        elif missing := selector.needs & ~features.has:
            raise ValueError(
                f"Method {selector.name!r} needs {missing.name}, which the features do not have. "
                "Pass it in VisionFeatures, or choose another method."
            )
        elif getattr(selector, "over_frames", False) and features.grid[0] < 2:
            raise ValueError(
                f"Method {selector.name!r} compares the frames of a video; an image has one. "
                "Choose another method for images."
            )
        else:
            pruned.append(number)
    arguments = [groups[i] for i in pruned], [counts[i] for i in pruned]
    batched = getattr(selector, "select_many", None)
    results = batched(*arguments) if batched else map(selector.select, *arguments)
    for number, selection in zip(pruned, results, strict=True):
        check_selection(selection, groups[number], counts[number], selector.name)
        selections[number] = selection
    return [selections[number] for number in range(len(groups))]


def _count(keep: SupportsIndex) -> int:
    if isinstance(keep, bool) or not isinstance(keep, SupportsIndex) or (count := index(keep)) < 1:
        raise BudgetError(f"keep must be a positive integer, got {keep!r}.", param="keep")
    return count


def _resolve(method: str | Selector, options: Mapping[str, Any]) -> Selector:
    if isinstance(method, str):
        return get_method(method, **options)
    if options:
        raise SettingsError("Options can only be given with a method's name; this method is already set up.")
    return method
