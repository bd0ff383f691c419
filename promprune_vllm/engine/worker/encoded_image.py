"""One encoded image: its tokens in the order of the prompt, in the groups a method selects from."""

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
        seen: Tokens before pruning.
        kept: Tokens after.
        method: Selects them.
        text: ``(M,)`` int64, tokens of the user's text, where the method looks at it.
    """

    seen: int
    kept: int
    method: Selector
    text: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens a method selects from on their own statistics: an image, or one of its crops.

    Args:
        features: n visual tokens.
        places: ``(n,)`` int64, which rows of the image they are, strictly increasing.
    """

    features: VisionFeatures
    places: Tensor


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """What the encoder made of one image.

    Args:
        rows: ``(N, W)`` every token as it would enter the language model unpruned. Its first D columns are the
            ``projected`` features; a tower may append more, which stay with their token.
        groups: Disjoint groups of its visual tokens, none of them empty.
        spare: ``(N - V,)`` int64, the rows that belong to no group because they show nothing of the image.
    """

    rows: Tensor
    groups: Sequence[Group]
    spare: Tensor

    @classmethod
    def whole(cls, rows: Tensor, features: VisionFeatures) -> EncodedImage:
        """Return an image that is one group of all its rows."""
        places = torch.arange(features.tokens, device=rows.device)
        return cls(rows, (Group(features, places),), places[:0])

    def with_text(self, text: Tensor) -> EncodedImage:
        """Return the image with the user's text, ``(M, D)`` embeddings, beside each group."""
        groups = [replace(group, features=replace(group.features, text=text)) for group in self.groups]
        return replace(self, groups=groups)

    def choose(self, keep: int, method: Selector) -> Chosen:
        """Choose ``keep`` of the N tokens.

        The budget goes to the groups in proportion to their sizes, by largest remainder. Spare rows are kept
        only when the budget exceeds all visual tokens: they cost as much as a token that shows something. So
        every count follows from sizes alone.

        Args:
            keep: Tokens to keep, ``1 <= keep <= N``.
            method: Selects from each group.
        """
        sizes = [group.features.tokens for group in self.groups]
        counts = BudgetPolicy().allocate(min(keep, sum(sizes)), sizes)
        asked = [(group, count) for group, count in zip(self.groups, counts, strict=True) if count]
        chosen = select_many([group.features for group, _ in asked], [count for _, count in asked], method)
        parts = [(group, selection) for (group, _), selection in zip(asked, chosen, strict=True)]
        return Chosen(self.rows, parts, self.spare[: max(0, keep - sum(sizes))])

    def pruned(self, keep: int, method: Selector, project: Project) -> tuple[Tensor, Tensor]:
        """Keep ``keep`` of the N tokens; see ``choose`` and ``Chosen.rows``."""
        return self.choose(keep, method).rows(project)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which tokens of an image stay.

    Args:
        image: ``(N, W)``, its rows.
        parts: The groups that keep any, with what each keeps.
        spare: ``(s,)`` int64, rows of no group that stay.
    """

    image: Tensor
    parts: Sequence[tuple[Group, Selection]]
    spare: Tensor

    def rows(self, project: Project) -> tuple[Tensor, Tensor]:
        """Return the kept rows and the places they had.

        Args:
            project: Takes ``(k, Dv)`` rows merged before the projector to ``(k, D)``.

        Returns:
            ``(K, W)`` rows in the order of the prompt, a new tensor, so that a cache does not hold the unpruned
            rows alive; and ``(K,)`` int64, strictly increasing.
        """
        kept = [self._part(group, selection, project) for group, selection in self.parts]
        places = torch.cat([*(places for places, _ in kept), self.spare])
        rows = torch.cat([*(rows for _, rows in kept), self.image[self.spare]])
        order = places.argsort()
        return rows[order], places[order]

    def _part(self, group: Group, selection: Selection, project: Project) -> tuple[Tensor, Tensor]:
        places = group.places[selection.indices]
        rows = self.image[places]
        if selection.rows is not None:
            merged = project(selection.rows) if selection.space is Need.ENCODER else selection.rows
            if merged.shape[0] != rows.shape[0]:
                raise RuntimeError(f"{merged.shape[0]} rows came out of the projector for {rows.shape[0]} tokens")
            rows[:, : merged.shape[1]] = merged  # what the tower appended stays that of the token itself
        return places, rows
