"""The methods that compare the frames of a video."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from promprune_vllm import VisionFeatures, get_method, methods, select
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.selected_tokens import select_tokens
from promprune_vllm.methods.promprune_video import PromPruneVideo, novelties, split
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
    assert NAMES == ["evs", "promprune-video", "vidcom2"]
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


VIDEO = get_method("promprune-video", mu=0.7)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_promprune_video_keeps_exactly_k(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(low, high)) for low, high in ((2, 9), (1, 5), (1, 6), (1, 24)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    features = clip(data.draw(st.sampled_from(KINDS)), shape, dtype)  # type: ignore[arg-type]
    keep = data.draw(st.integers(1, features.tokens - 1))
    assert len(select(features, keep, VIDEO).indices) == keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_promprune_video_selects_from_one_frame_what_promprune_does(dtype: torch.dtype) -> None:
    frame = clip("random", (1, 6, 7, 48), dtype)
    for keep in (1, 9, 41):
        for mu in (0.5, 0.9, 0.95):
            expected = select(frame, keep, "promprune", mu=mu).indices
            assert torch.equal(get_method("promprune-video", mu=mu).select(frame, keep).indices, expected)


@each_kind
@pytest.mark.parametrize("mu", [0.5, 0.9])
def test_a_frame_that_chooses_its_quota_chooses_what_it_would_of_more(kind: str, mu: float) -> None:
    """On a CPU, frames choose no more than their quotas; elsewhere, as many as any could get."""
    method, features = PromPruneVideo(mu=mu), clip(kind, (5, 4, 5, 32))
    novelty, worth = novelties(features)
    for keep in (3, 30, 70):
        quotas = split(worth, 20, keep)
        few, many = (
            method._rank(features.frames(), novelty, quotas, most)[0] < quotas[:, None]
            for most in (quotas.clamp_max(19).tolist(), [min(keep, 19)] * 5)
        )
        assert torch.equal(few, many)
        assert few.sum() == keep


def test_promprune_video_needs_saliency_as_promprune_does() -> None:
    features = replace(clip("still", (3, 4, 5, 32)), saliency=None)
    with pytest.raises(ValueError, match="'promprune-video' needs SALIENCY"):
        select(features, 7, VIDEO)


def test_frames_in_which_nothing_changes_share_what_frames_get_alike() -> None:
    for kind in ("static", "still"):
        features = clip(kind, (8, 6, 7, 64))
        first, *later = by_frame(select(features, 40, VIDEO).indices, features)
        assert first >= 36  # 90% of it, and an eighth of the rest
        assert max(later) <= 1
        first, *later = by_frame(select(features, 80, VIDEO).indices, features)
        assert first == 42  # all of it
        assert set(later) <= {5, 6}


def test_a_cut_costs_as_much_as_the_first_frame() -> None:
    features = clip("still", (8, 6, 7, 64))
    features.projected[4 * 42 :] = clip("still", (4, 6, 7, 64), seed=1).projected
    counts = by_frame(select(features, 60, VIDEO).indices, features)
    assert 0.8 * counts[0] <= counts[4] <= counts[0]  # some noise is like some other noise
    assert counts[0] + counts[4] >= 54


@pytest.mark.parametrize("step", [1, 3])
def test_of_a_slow_pan_only_what_comes_into_view_is_new(step: int) -> None:
    """Each frame is three cells a side of a still picture; ``step`` of three frames move by a cell."""
    world = torch.randn(6, 16, 64, generator=torch.Generator().manual_seed(0))
    views = torch.stack([world[:, frame // step : frame // step + 6] for frame in range(10)])
    features = replace(clip("random", (10, 6, 6, 64)), projected=views.reshape(-1, 64))
    counts = by_frame(select(features, 36, VIDEO).indices, features)
    novelty, worth = novelties(features)
    new = novelty.view(10, 6, 6)[1:] > 0.1
    assert not new[:, :, :5].any()  # the last column alone
    assert new[:, :, 5].all(dim=1).tolist() == [frame % step == 0 for frame in range(1, 10)]
    assert counts[0] == max(counts) >= 2 * sorted(counts)[-2]
    assert worth[1:].max() < 0.5 * worth[0]


def test_what_an_object_covered_for_a_moment_is_not_new_when_it_leaves() -> None:
    features, shown = with_object()
    novelty, worth = novelties(features)
    assert (novelty.flatten()[shown] > 0.1).all()
    assert novelty[6:].max() < 0.01
    assert worth[5] > 10 * worth[6]


def test_tokens_that_are_not_numbers_are_never_new() -> None:
    features = clip("event", (5, 4, 5, 32))
    features.projected[45] = torch.nan
    features.projected[46] = 0
    novelty, _ = novelties(features)
    assert novelty[2, 5:7].tolist() == [0, 0]
    assert novelty[2, :5].min() > 0.5


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numbers = max(
            [self.numbers, *(each.numel() for each in tree_leaves(result) if isinstance(each, Tensor))]
        )
        return result


@each_method
def test_memory_grows_with_the_number_of_frames_and_not_with_its_square(method: str) -> None:
    def largest(frames: int) -> int:
        features = clip("event", (frames, 6, 8, 16))
        with Largest() as seen:
            select(features, features.tokens // 4, method)
        return seen.numbers

    assert largest(32) <= 4 * largest(8)
    assert largest(32) < (32 * 48) ** 2 / 20  # far from a matrix of all tokens


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_a_budget_is_split_in_proportion_as_far_as_frames_reach(data: st.DataObject) -> None:
    shares = data.draw(st.lists(st.sampled_from([0.0, 1e-6, 0.01, 0.1, 0.5, 1.0, 3.0]), min_size=1, max_size=9))
    size = data.draw(st.integers(1, 30))
    keep = data.draw(st.integers(0, len(shares) * size - 1))
    quotas = split(torch.tensor(shares, dtype=torch.float64), size, keep).tolist()
    assert sum(quotas) == keep
    assert all(0 <= quota <= size for quota in quotas)
    for (one, more), (other, less) in itertools.product(zip(shares, quotas, strict=True), repeat=2):
        assert one < other or more >= less - 1


@pytest.mark.parametrize("name", ["prunesid", "random", "uniform"])
def test_methods_for_images_prune_clips_frame_by_frame_with_equal_budgets(name: str) -> None:
    """As PruneSID's paper does: it keeps 136 of the 2048 tokens of a clip of 8 frames, 17 of each."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2048, 24, generator=generator)
    features = VisionFeatures(rows, (8, 16, 16), saliency=torch.rand(2048, generator=generator), encoder=rows)
    _, positions = select_tokens(EncodedImage.of_frames(rows, features), 136, get_method(name)).rows(lambda x: x)
    assert by_frame(positions, features) == [17] * 8
    for number, frame in enumerate(features.frames()):
        here = positions[positions // 256 == number] % 256
        assert torch.equal(here, select(frame, 17, name).indices)
