"""An encoded image or video: its tokens in the order of the prompt, and the groups that a method selects from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import Selector
from promprune_vllm.engine.keys import FRAME


@dataclass(frozen=True, slots=True)
class PruneJob:
    """How one image is pruned.

    Args:
        total: Tokens before pruning.
        kept: Tokens after pruning.
        method: Selects the kept tokens.
        text: ``(M,)`` int64, tokens of the user's text, if the method uses it.
        key: The image's key in the feature store; ``None`` if it is not to be stored.
        layout: What ``keys.LAYOUT`` says of a video.
    """

    total: int
    kept: int
    method: Selector
    text: Tensor | None = None
    key: tuple[bytes, int] | None = None
    layout: Sequence[int] = ()

    @property
    def rows(self) -> int:
        """Rows that enter the language model: the kept tokens, and the text between frames in ``layout``."""
        return self.kept + sum(entry != FRAME for entry in self.layout)

    @property
    def needs(self) -> Need:
        """Features of the image that the selection uses."""
        return Need.PROJECTED if self.kept == self.total else self.method.needs & ~Need.TEXT


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens that a method selects from separately: those of an image, of one of its crops, or of a frame.

    Args:
        features: Features of n visual tokens.
        positions: ``(n,)`` int64, strictly increasing: their positions among the image's rows.
    """

    features: VisionFeatures
    positions: Tensor


@dataclass(frozen=True, slots=True)
class TextBetween:
    """S tokens of text among the N visual tokens of a video.

    Args:
        rows: ``(S, W)``: the language model's embeddings, and zeros in columns that a tower appends.
        places: ``(S,)`` int64, positions of the text among all N + S rows.
        visual: ``(N,)`` int64, positions of the visual tokens there.
        offsets: ``(S,)`` int64, M-RoPE positions of the text behind the first position of the video.
        frame_offsets: The same of each frame's first cell.
    """

    rows: Tensor
    places: Tensor
    visual: Tensor
    offsets: Tensor
    frame_offsets: Sequence[int]


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image or video as the encoder returned it.

    Args:
        rows: ``(N, W)``, every token as it would enter the language model unpruned. The first D columns are the
            ``projected`` features; a tower may append more columns, which stay with their token.
        groups: Disjoint, nonempty groups of its V visual tokens.
        newlines: ``(N - V,)`` int64, positions of the rows in no group, which show nothing of the image: the
            learned newline that ends each row of LLaVA-NeXT's crops.
        is_video: Whether the groups are the frames of a video, which share a budget evenly.
        offsets: Offset in time of each group; see ``cells.CHANNELS``. None if groups have a position of their own.
        between: The text between the frames of a video, if its rows are among those of the frames.
    """

    rows: Tensor
    groups: Sequence[Group]
    newlines: Tensor
    is_video: bool = False
    offsets: Sequence[int] = ()
    between: TextBetween | None = None

    @classmethod
    def whole(cls, rows: Tensor, features: VisionFeatures) -> EncodedImage:
        """Return an image with a single group of all its rows."""
        positions = torch.arange(features.tokens, device=rows.device)
        return cls(rows, (Group(features, positions),), positions[:0])

    @classmethod
    def of_frames(cls, rows: Tensor, features: VisionFeatures) -> EncodedImage:
        """Return an image, or a video with a group for each of its frames."""
        frames, height, width = features.grid
        if frames == 1:
            return cls.whole(rows, features)
        positions = torch.arange(features.tokens, device=rows.device)
        groups = list(map(Group, features.frames(), torch.split(positions, height * width)))
        return cls(rows, groups, positions[:0], is_video=True)

    def joined(self) -> EncodedImage:
        """Return a video with one group of all its frames, for methods that compare frames."""
        frames = [group.features for group in self.groups]
        _, height, width = frames[0].grid
        features = replace(VisionFeatures.join(frames), grid=(len(frames), height, width))
        return replace(self, groups=[Group(features, torch.cat([group.positions for group in self.groups]))])

    def with_text(self, text: Tensor) -> EncodedImage:
        """Return the image with the user's text, ``(M, D)`` embeddings, added to the features of each group."""
        groups = [replace(group, features=replace(group.features, text=text)) for group in self.groups]
        return replace(self, groups=groups)

    def cells(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where tokens are in the grid of their group, an image or a frame of a video.

        Args:
            positions: ``(K,)`` int64, positions of visual tokens among the image's rows; or of visual tokens and
                text among both, see ``TextBetween``.

        Returns:
            Rows, columns and offsets (-1 for none), ``(K,)`` int64 each; see ``cells.encode_cells``.
        """
        count, offsets = len(self.rows), self.offsets or [-1] * len(self.groups)
        if self.between is not None:
            count, offsets = count + len(self.between.rows), self.between.frame_offsets
        cell, offset = positions.new_zeros(count), positions.new_zeros(count)
        width = positions.new_ones(count)
        for group, ahead in zip(self.groups, offsets, strict=True):
            at = group.positions if self.between is None else self.between.visual[group.positions]
            cell[at] = torch.arange(len(at), device=positions.device)
            width[at] = group.features.grid[2]
            offset[at] = ahead
        if self.between is not None:
            offset[self.between.places] = self.between.offsets
        return cell[positions] // width[positions], cell[positions] % width[positions], offset[positions]
