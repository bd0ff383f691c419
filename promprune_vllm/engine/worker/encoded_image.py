"""An encoded image: its tokens in the order of the prompt, and the groups that a method selects from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.core.registry import Selector
from promprune_vllm.core.select import select_many
from promprune_vllm.core.selection import Selection

Project = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PruneJob:
    """How one image is pruned.

    Args:
        total: Tokens before pruning.
        kept: Tokens after pruning.
        method: Selects the kept tokens.
        text: ``(M,)`` int64, tokens of the user's text, if the method uses it.
    """

    total: int
    kept: int
    method: Selector
    text: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens that a method selects from separately: those of an image, or of one of its crops.

    Args:
        features: Features of n visual tokens.
        positions: ``(n,)`` int64, strictly increasing: their positions among the image's rows.
    """

    features: VisionFeatures
    positions: Tensor


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image as the encoder returned it.

    Args:
        rows: ``(N, W)``, every token as it would enter the language model unpruned. The first D columns are the
            ``projected`` features; a tower may append more columns, which stay with their token.
        groups: Disjoint, nonempty groups of its V visual tokens.
        newlines: ``(N - V,)`` int64, positions of the rows in no group, which show nothing of the image: the
            learned newline that ends each row of LLaVA-NeXT's crops.
    """

    rows: Tensor
    groups: Sequence[Group]
    newlines: Tensor

    @classmethod
    def whole(cls, rows: Tensor, features: VisionFeatures) -> EncodedImage:
        """Return an image with a single group of all its rows."""
        positions = torch.arange(features.tokens, device=rows.device)
        return cls(rows, (Group(features, positions),), positions[:0])

    def with_text(self, text: Tensor) -> EncodedImage:
        """Return the image with the user's text, ``(M, D)`` embeddings, added to the features of each group."""
        groups = [replace(group, features=replace(group.features, text=text)) for group in self.groups]
        return replace(self, groups=groups)

    def select(self, keep: int, method: Selector) -> SelectedTokens:
        """Select ``keep`` of the N tokens.

        The budget is divided among the groups in proportion to their sizes, by largest remainder. Newlines are
        kept only if the budget exceeds all visual tokens: they cost as much as a token that shows something. So
        every count follows from sizes alone.

        Args:
            keep: Tokens to keep, ``1 <= keep <= N``.
            method: Selects from each group.
        """
        sizes = [group.features.tokens for group in self.groups]
        counts = BudgetPolicy().allocate(min(keep, sum(sizes)), sizes)
        used = [(group, count) for group, count in zip(self.groups, counts, strict=True) if count]
        selections = select_many([group.features for group, _ in used], [count for _, count in used], method)
        parts = [(group, selection) for (group, _), selection in zip(used, selections, strict=True)]
        return SelectedTokens(self.rows, parts, self.newlines[: max(0, keep - sum(sizes))])


@dataclass(frozen=True, slots=True)
class SelectedTokens:
    """The tokens of an image that are kept.

    Args:
        image: ``(N, W)``, the image's rows.
        parts: The groups that keep any tokens, each with its selection.
        newlines: ``(s,)`` int64, positions of the newline rows that are kept.
    """

    image: Tensor
    parts: Sequence[tuple[Group, Selection]]
    newlines: Tensor

    def rows(self, project: Project) -> tuple[Tensor, Tensor]:
        """Return the kept rows and their positions in the image.

        Args:
            project: Projects ``(k, Dv)`` rows, merged before the projector, to ``(k, D)``.

        Returns:
            ``(K, W)`` rows in the order of the prompt, as a new tensor, so that caches do not keep the unpruned
            rows alive; and their positions ``(K,)`` int64, strictly increasing.
        """
        kept = [self._part(group, selection, project) for group, selection in self.parts]
        positions = torch.cat([*(positions for positions, _ in kept), self.newlines])
        rows = torch.cat([*(rows for _, rows in kept), self.image[self.newlines]])
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
