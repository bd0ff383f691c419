"""Selects K of an encoded image's N tokens, and picks out their rows for the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from promprune_vllm.core.features import Need
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.core.registry import Selector
from promprune_vllm.core.select import select_many
from promprune_vllm.core.selection import Selection
from promprune_vllm.engine.worker.encoded_image import EncodedImage, Group, TextBetween

Project = Callable[[Tensor], Tensor]


def select_tokens(image: EncodedImage, keep: int, method: Selector) -> SelectedTokens:
    """Select ``keep`` of the N tokens.

    The budget is divided among the groups in proportion to their sizes, by largest remainder; among the frames of
    a video evenly, unless the method compares frames: it decides how many tokens of each it keeps. Newlines are
    kept only if the budget exceeds all visual tokens: they cost as much as a token that shows something. So
    every count follows from sizes alone.

    Args:
        image: The encoded image.
        keep: Tokens to keep, ``1 <= keep <= N``.
        method: Selects from each group.
    """
    if getattr(method, "over_frames", False):
        image = image.joined()
    sizes = [group.features.tokens for group in image.groups]
    counts = BudgetPolicy.share(min(keep, sum(sizes)), sizes, frames=image.is_video)
    used = [(group, count) for group, count in zip(image.groups, counts, strict=True) if count]
    selections = select_many([group.features for group, _ in used], [count for _, count in used], method)
    parts = [(group, selection) for (group, _), selection in zip(used, selections, strict=True)]
    return SelectedTokens(image.rows, parts, image.newlines[: max(0, keep - sum(sizes))], image.between)


@dataclass(frozen=True, slots=True)
class SelectedTokens:
    """The tokens of an image that are kept.

    Args:
        image: ``(N, W)``, the image's rows.
        parts: The groups that keep any tokens, each with its selection.
        newlines: ``(s,)`` int64, positions of the newline rows that are kept.
        between: The text between frames, all of which is kept with them; see ``EncodedImage``.
    """

    image: Tensor
    parts: Sequence[tuple[Group, Selection]]
    newlines: Tensor
    between: TextBetween | None = None

    def rows(self, project: Project) -> tuple[Tensor, Tensor]:
        """Return the kept rows and their positions in the image.

        Args:
            project: Projects ``(k, Dv)`` rows, merged before the projector, to ``(k, D)``.

        Returns:
            ``(K, W)`` rows in the order of the prompt, as a new tensor, so that caches do not keep the unpruned
            rows alive; and their positions ``(K,)`` int64, strictly increasing. With text between frames,
            ``K + S`` of them, and positions among the rows of both.
        """
        kept = [self._part(group, selection, project) for group, selection in self.parts]
        positions = torch.cat([*(positions for positions, _ in kept), self.newlines])
        rows = torch.cat([*(rows for _, rows in kept), self.image[self.newlines]])
        if self.between is not None:
            positions = torch.cat([self.between.visual[positions], self.between.places])
            rows = torch.cat([rows, self.between.rows])
        order = positions.argsort()
        return rows[order], positions[order]

    def _part(self, group: Group, selection: Selection, project: Project) -> tuple[Tensor, Tensor]:
        positions = group.positions[selection.indices]
        rows = self.image[positions]
        if selection.rows is not None:
            merged = project(selection.rows) if selection.space is Need.ENCODER else selection.rows
            if merged.shape[0] != rows.shape[0]:
                raise RuntimeError(f"the projector returned {merged.shape[0]} rows for {rows.shape[0]} tokens")
            rows[:, : merged.shape[1]] = merged  # columns that the tower appended stay as they are
        return positions, rows
