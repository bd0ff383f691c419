"""``EncodedImage.pruned``: counts, places and rows, whatever the groups, the spare rows and the method."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from promprune_vllm import Need, Selection, VisionFeatures, get_method, select
from promprune_vllm.core.frames import split_over_frames
from promprune_vllm.engine.worker.encoded_image import EncodedImage, Group
from promprune_vllm.engine.worker.selected_tokens import select_tokens

D, EXTRA, DV = 4, 3, 7


@dataclass(frozen=True)
class Last:
    """Keeps the last tokens of each group, and remembers what it was asked."""

    name: ClassVar[str] = "last"
    needs: ClassVar[Need] = Need.PROJECTED
    paper: ClassVar[str] = "none"
    merges: ClassVar[bool] = False
    asked: list[tuple[int, int]] = field(default_factory=list)

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        self.asked.append((features.tokens, keep))
        return Selection(torch.arange(features.tokens - keep, features.tokens))


@dataclass(frozen=True)
class Merging(Last):
    """Likewise, with rows that are no tokens of the image."""

    merges: ClassVar[bool] = True
    space: Need = Need.PROJECTED

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        made_of = features.projected if self.space is Need.PROJECTED else features.encoder
        assert made_of is not None
        indices = super().select(features, keep).indices
        return Selection(indices, rows=-1 - made_of[indices], space=self.space)


def project(rows: Tensor) -> Tensor:
    """A stand-in for a projector: ``(K, DV)`` to ``(K, D)``."""
    return 1000 + rows[:, :D]


def made(owners: list[int], extra: int = EXTRA) -> EncodedImage:
    """An image whose row i belongs to group ``owners[i]``, or is spare where that is negative.

    Row i holds ``i`` in each of its projected columns and ``i + 0.5`` in the columns behind them.
    """
    index = torch.arange(len(owners))
    rows = torch.cat([index[:, None].expand(-1, D), index[:, None].expand(-1, extra) + 0.5], dim=1)
    owner = torch.tensor(owners)
    groups = []
    for group in sorted({o for o in owners if o >= 0}):
        places = (owner == group).nonzero().flatten()
        encoder = places[:, None].expand(-1, DV).double() / 100
        features = VisionFeatures(
            projected=rows[places, :D], grid=(1, 1, len(places)), encoder=encoder.to(rows.dtype)
        )
        groups.append(Group(features, places))
    return EncodedImage(rows, groups, (owner < 0).nonzero().flatten())


OWNERS = st.lists(st.integers(-1, 3), min_size=1, max_size=24).filter(lambda owners: max(owners) >= 0)


def shares(keep: int, sizes: list[int]) -> list[int]:
    """Largest remainder, from its definition."""
    exact = [Fraction(keep * size, sum(sizes)) for size in sizes]
    counts = [share.numerator // share.denominator for share in exact]
    while sum(counts) < keep:
        rest = [share - count for share, count in zip(exact, counts, strict=True)]
        counts[rest.index(max(rest))] += 1
    return counts


@settings(deadline=None)
@given(OWNERS)
def test_every_budget_is_met_exactly_and_split_in_proportion(owners: list[int]) -> None:
    image = made(owners)
    sizes = [group.features.tokens for group in image.groups]
    visual = sum(sizes)
    for keep in range(1, len(owners) + 1):
        rows, places = select_tokens(image, keep, Last()).rows(project)
        assert rows.shape == (keep, D + EXTRA)
        assert places.dtype == torch.int64
        assert bool((places[1:] > places[:-1]).all())
        assert torch.equal(rows, image.rows[places])  # in the prompt's order, appended columns with their token
        kept = [owners[place] for place in places.tolist()]
        counts = [kept.count(group) for group in sorted(set(owners) - {-1})]
        assert counts == shares(min(keep, visual), sizes)
        assert kept.count(-1) == max(0, keep - visual)


@settings(deadline=None)
@given(OWNERS, st.sampled_from([Need.PROJECTED, Need.ENCODER]))
def test_merged_rows_replace_the_projected_columns_and_nothing_else(owners: list[int], space: Need) -> None:
    image = made(owners)
    sizes = {group: owners.count(group) for group in set(owners)}
    for keep in range(1, len(owners) + 1):
        rows, places = select_tokens(image, keep, Merging(space=space)).rows(project)
        assert torch.equal(rows[:, D:], image.rows[places, D:])
        kept = [owners[place] for place in places.tolist()]
        for row, place, owner in zip(rows[:, :D], places.tolist(), kept, strict=True):
            if owner < 0 or kept.count(owner) == sizes[owner]:  # spare, or of a group that is kept whole
                expected = float(place)
            else:
                expected = 1000 - 1 - place / 100 if space is Need.ENCODER else -1.0 - place
            torch.testing.assert_close(row, torch.full((D,), expected))


def test_a_method_is_asked_only_where_something_is_kept_and_something_dropped() -> None:
    image = made([0, 1, 1, 1, 1, 1, 1, 1, -1])
    method = Last()
    select_tokens(image, 1, method).rows(project)  # nothing for the group of one token
    assert method.asked == [(7, 1)]
    method.asked.clear()
    _, places = select_tokens(image, 8, method).rows(project)
    assert method.asked == []  # every group is whole
    assert places.tolist() == list(range(8))


def test_spare_rows_come_last_of_all_in_the_budget_and_in_place_in_the_prompt() -> None:
    image = made([0, 0, -1, 0, 0, -1])
    assert select_tokens(image, 4, Last()).rows(project)[1].tolist() == [0, 1, 3, 4]
    assert select_tokens(image, 5, Last()).rows(project)[1].tolist() == [0, 1, 2, 3, 4]
    assert select_tokens(image, 6, Last()).rows(project)[1].tolist() == [0, 1, 2, 3, 4, 5]


def test_kept_rows_do_not_share_memory_with_the_image() -> None:
    for owners, keep in (([0] * 6, 3), ([0] * 6, 6), ([0, 0, -1, 1, 1, -1], 6)):
        for method in (Last(), Merging()):
            image = made(owners)
            before = image.rows.clone()
            rows, _ = select_tokens(image, keep, method).rows(project)
            assert rows.untyped_storage().nbytes() == rows.nbytes  # nothing else is held alive
            rows.fill_(-5)
            assert torch.equal(image.rows, before)


def test_a_whole_image_is_one_group_of_all_its_rows() -> None:
    features = VisionFeatures(projected=torch.randn(6, D), grid=(1, 2, 3))
    image = EncodedImage.whole(features.projected, features)
    (group,) = image.groups
    assert group.positions.tolist() == list(range(6))
    assert group.features.grid == (1, 2, 3)
    assert image.newlines.tolist() == []


@pytest.mark.parametrize("name", ["uniform", "random", "divprune"])
def test_registered_methods_keep_exact_counts_in_interleaved_groups(name: str) -> None:
    torch.manual_seed(0)
    image = made([0, 1, -1] * 8)
    for keep in range(1, 25):
        rows, places = select_tokens(image, keep, get_method(name)).rows(project)
        assert torch.equal(rows, image.rows[places])
        assert len(set(places.tolist())) == keep


def test_the_frames_of_a_video_share_its_memory() -> None:
    features = VisionFeatures(projected=torch.randn(24, 3), grid=(4, 2, 3), saliency=torch.rand(24))
    video = EncodedImage.of_frames(features.projected, features)
    assert video.is_video
    assert [group.features.grid for group in video.groups] == [(1, 2, 3)] * 4
    for i, group in enumerate(video.groups):
        assert group.positions.tolist() == list(range(6 * i, 6 * i + 6))
        assert torch.equal(group.features.projected, features.projected[group.positions])
        assert group.features.projected.untyped_storage().data_ptr() == features.projected.data_ptr()
    (whole,) = video.joined().groups
    assert whole.features.grid == (4, 2, 3)
    assert torch.equal(whole.features.projected, features.projected)
    assert whole.features.saliency is not None
    assert torch.equal(whole.features.saliency, features.saliency)
    assert not EncodedImage.of_frames(torch.randn(6, 3), video.groups[0].features).is_video


@pytest.mark.parametrize("name", ["promprune", "divprune", "uniform"])
def test_a_long_clip_is_pruned_frame_by_frame(name: str) -> None:
    """512 frames: no matrix of all tokens of the clip, which would take 4 GiB, is ever made."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512 * 64, 8, generator=generator)
    features = VisionFeatures(
        projected=rows, grid=(512, 8, 8), saliency=torch.rand(len(rows), generator=generator)
    )
    video, method = EncodedImage.of_frames(rows, features), get_method(name)
    kept, positions = select_tokens(video, 512 * 3 + 100, method).rows(lambda merged: merged)
    counts = split_over_frames(512 * 3 + 100, 512, 64)
    assert torch.bincount(positions // 64, minlength=512).tolist() == list(counts)
    assert torch.equal(kept, rows[positions])
    for frame in (0, 255, 511):
        alone = select(video.groups[frame].features, counts[frame], method).indices
        assert torch.equal(positions[positions // 64 == frame] - 64 * frame, alone)
