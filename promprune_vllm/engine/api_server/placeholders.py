"""Shortens the placeholder of an image or a video in the prompt to the tokens that it keeps.

A placeholder may have text among its visual tokens: InternVL's has one token before and one after, and models
with tiles have separators between them. Text stays. The visual tokens form runs, which share the budget as a
method's groups do, in proportion to their sizes. So every count follows from sizes alone, before anything is
encoded. A family with several runs per image has one group for each, with as many tokens. If a video has a run
for each frame, these share the budget evenly; else its one run has all of it.

Of a video whose method decides how many tokens each frame keeps, the counts are not known. From the first visual
token to the last, its placeholder is then one run of the kept tokens and the text between frames together, and the
worker returns embeddings of both. All have the visual token's id: those of the text would stand in wrong places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.processing import PromptUpdateDetails

from promprune_vllm.core.budget import FIELD, IMAGE, VIDEO
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan
from promprune_vllm.engine.keys import COUNTS, FRAME, LAYOUT, field_of
from promprune_vllm.errors import BudgetError

ARTICLES = {IMAGE: "an image", VIDEO: "a video"}


def shorten(update: Any, plans: Sequence[ImagePlan], items: Sequence[Any]) -> Any:
    """Return a prompt update of vLLM's whose placeholders have as many visual tokens as the images keep.

    Args:
        update: A ``PromptReplacement`` or ``PromptInsertion``. Its content is a list of tokens or
            ``PromptUpdateDetails``, or a function of the image's index that returns one.
        plans: One per image.
        items: The images' fields. What ``keys.COUNTS`` says of an image that keeps all its tokens is corrected: an
            option may change the image in a way that is not counted. ``keys.LAYOUT`` is filled in. A processor
            cache may store the fields right after this, and nobody can change them then.
    """

    def shortened(index: int) -> Any:
        content, plan = _content(update, index), plans[index]
        if plan.kept == plan.total:
            items[index][field_of(plan.kind, COUNTS)].data[:2] = _visual_tokens(content)
            return content
        if plan.between:
            items[index][field_of(plan.kind, LAYOUT)].data = torch.tensor(_layout(content))
        return _shorten(content, plan)

    name = "insertion" if hasattr(update, "insertion") else "replacement"
    changed: Mapping[str, Any] = {name: shortened}
    return replace(update, **changed)


def visual_tokens(update: Any, index: int) -> int:
    """Return how many visual tokens a prompt update puts in the place of an image or a video."""
    return _visual_tokens(_content(update, index))


def text_between(update: Any, index: int) -> int:
    """Return how many tokens of text are between the runs of visual tokens of an image or a video."""
    return sum(entry != FRAME for entry in _layout(_content(update, index)))


def _layout(content: Any) -> list[int]:
    """Return ``keys.LAYOUT`` of a placeholder."""
    visual = _is_visual(content)
    if visual is None:
        return [FRAME]
    start, end = _first_and_last(visual)
    runs = groupby(zip(visual[start:end], content.full[start:end], strict=True), lambda pair: pair[0])
    return [entry for is_frame, run in runs for entry in ([FRAME] if is_frame else [token for _, token in run])]


def _first_and_last(visual: Sequence[bool]) -> tuple[int, int]:
    """Return the index of the first visual token, and the one behind the last."""
    return visual.index(True), len(visual) - visual[::-1].index(True)


def _content(update: Any, index: int) -> Any:
    content = update.content
    return content(index) if callable(content) else content


def _is_visual(content: Any) -> list[bool] | None:
    """Return which tokens of a placeholder are visual ones, or ``None`` if all are."""
    is_embed = content.is_embed if isinstance(content, PromptUpdateDetails) else None
    visual: list[bool] | None = None if is_embed is None else is_embed(content.full).tolist()
    return visual


def _visual_tokens(content: Any) -> int:
    visual = _is_visual(content)
    if visual is not None:
        return sum(visual)
    return len(content.full if isinstance(content, PromptUpdateDetails) else content)


def _shorten(content: Any, plan: ImagePlan) -> Any:
    full: list[int] = content.full if isinstance(content, PromptUpdateDetails) else content
    visual, made = _is_visual(content), _visual_tokens(content)
    if made != plan.total:
        raise BudgetError(
            f"{FIELD} cannot be applied to {ARTICLES[plan.kind]} that vLLM made {made} tokens of, and which was "
            f"counted as {plan.total}: an option in mm_processor_kwargs changes it in a way that is not counted. "
            f"Leave the option out, or {FIELD}.",
            reason="unsupported",
        )
    if visual is None:
        return full[: plan.kept]
    if plan.between:
        return _with_text(full, visual, plan)
    stays = kept_tokens(visual, plan.kept, frames=plan.kind == VIDEO)
    shorter = [token for token, stay in zip(full, stays, strict=True) if stay]
    return _details(shorter, [is_visual for is_visual, stay in zip(visual, stays, strict=True) if stay])


def _with_text(full: Sequence[int], visual: list[bool], plan: ImagePlan) -> PromptUpdateDetails:
    """Return a placeholder with one run of the kept tokens and the text between frames."""
    start, end = _first_and_last(visual)
    run = [full[start]] * plan.rows
    mask = [start <= i < start + plan.rows for i in range(start + plan.rows + len(full) - end)]
    return _details([*full[:start], *run, *full[end:]], mask)


def _details(full: list[int], visual: Sequence[bool]) -> PromptUpdateDetails:
    mask = torch.tensor(visual)

    def is_embed(_: list[int]) -> Tensor:
        return mask

    return PromptUpdateDetails(full=full, is_embed=is_embed)


def kept_tokens(is_visual: Sequence[bool], keep: int, *, frames: bool = False) -> list[bool]:
    """Return which tokens of a placeholder stay: all text, and the first ones of each run of visual tokens.

    Args:
        is_visual: Whether each token is a visual one.
        keep: Visual tokens to keep in all.
        frames: Whether the runs are the frames of a video.
    """
    runs = [(visual, len(list(run))) for visual, run in groupby(is_visual)]
    sizes = [size for visual, size in runs if visual]
    counts = iter(BudgetPolicy.share(keep, sizes, frames=frames))
    stays: list[bool] = []
    for visual, size in runs:
        kept = next(counts) if visual else size
        stays += [True] * kept + [False] * (size - kept)
    return stays
