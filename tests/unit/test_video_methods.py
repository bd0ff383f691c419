"""The methods that compare the frames of a video."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from promprune_vllm import VisionFeatures, get_method, methods, select
from tests.video_features import KINDS, clip

NAMES = list(methods(over_frames=True))
each_method = pytest.mark.parametrize("method", NAMES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def by_frame(indices: Tensor, features: VisionFeatures) -> list[int]:
    """How many tokens each frame keeps."""
    frames, rows, columns = features.grid
    counts: list[int] = (indices // (rows * columns)).bincount(minlength=frames).tolist()
    return counts


def with_object() -> tuple[VisionFeatures, list[int]]:
    """A clip of nine frames and the two tokens of an object in the sixth."""
    features, shown = clip("still", (9, 4, 5, 64)), [5 * 20 + 8, 5 * 20 + 9]
    features.projected.mul_(0.1).add_(1)
    features.projected[shown] = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    return features, shown


def test_the_registry_tells_them_apart() -> None:
    assert NAMES == ["evs", "vidcom2"]
    assert {**methods(over_frames=True), **methods(over_frames=False)} == dict(methods())
    assert not any(method.over_frames for method in methods(over_frames=False).values())


@each_method
@each_kind
@pytest.mark.parametrize("shape", [(2, 1, 1, 8), (2, 3, 4, 16), (5, 2, 3, 16), (7, 1, 2, 1)], ids=str)
def test_keep_exactly_k_of_any_clip(method: str, kind: str, shape: tuple[int, int, int, int]) -> None:
    features = clip(kind, shape)
    for keep in range(1, features.tokens):
        indices = select(features, keep, method).indices  # which checks their number, order and limits
        assert torch.equal(indices, select(features, keep, method).indices)


@each_method
def test_an_image_is_refused_but_may_keep_all_its_tokens(method: str) -> None:
    image = clip("random", (1, 4, 5, 8))
    with pytest.raises(ValueError, match=f"'{method}' compares the frames of a video; an image has one"):
        select(image, 7, method)
    assert len(select(image, 20, get_method(method)).indices) == 20


def test_evs_keeps_little_but_the_first_frame_of_a_clip_in_which_one_token_changes() -> None:
    features = clip("static", (6, 4, 5, 32))
    features.projected[3 * 20 + 7 :: 20] = torch.randn(32)  # token 7, from the fourth frame on
    indices = select(features, 21, "evs").indices
    assert indices.tolist() == [*range(20), 67]


def test_evs_keeps_part_of_the_first_frame_if_there_is_no_room_for_it() -> None:
    features = clip("random", (4, 4, 5, 32))
    assert select(features, 5, "evs").indices.tolist() == [2, 6, 10, 14, 18]
    assert select(features, 20, "evs").indices.tolist() == list(range(20))


def test_evs_counts_a_token_that_is_not_a_number_as_unchanged() -> None:
    features = clip("event", (4, 4, 5, 32))
    features.projected[70] = torch.nan
    indices = select(features, 40, "evs").indices.tolist()
    assert indices[:20] == list(range(20))
    assert 70 not in indices


@each_method
def test_what_is_new_in_one_frame_is_kept(method: str) -> None:
    """An object of two tokens that is there for one frame of nine, before a background of one color."""
    features, shown = with_object()
    assert set(shown) <= set(select(features, 24, method).indices.tolist())


def test_vidcom2_keeps_more_of_a_frame_unlike_the_others() -> None:
    features = clip("event", (9, 4, 5, 64))
    counts = by_frame(select(features, 45, "vidcom2").indices, features)
    assert counts[4] == max(counts) > sorted(counts)[-2]
    assert min(counts) >= 1


@pytest.mark.parametrize("kind", ["random", "still", "static"])
def test_vidcom2_keeps_a_token_of_every_frame(kind: str) -> None:
    features = clip(kind, (6, 3, 4, 32))
    for keep in range(6, features.tokens):
        assert min(by_frame(select(features, keep, "vidcom2").indices, features)) >= 1


def test_below_one_token_per_frame_vidcom2_keeps_one_of_some_frames() -> None:
    features, shown = with_object()
    for keep in (1, 3, 8):
        indices = select(features, keep, "vidcom2").indices
        assert set(shown) & set(indices.tolist())
        assert sum(count > 0 for count in by_frame(indices, features)) >= keep - 1  # two of the object's frame
