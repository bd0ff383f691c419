"""Selecting by the name of a method: the one place that owns the edges and has every outcome checked."""

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


def _resolve(method: str | Selector, options: Mapping[str, Any]) -> Selector:
    if isinstance(method, str):
        return get_method(method, **options)
    if options:
        raise SettingsError("Options belong to a method given by name; this one is already set up.")
    return method
