"""Budgets of prompts with videos: per frame, in lists over images and videos, and split over a video's frames."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promprune_vllm.core.budget import IMAGE, MAX_BUDGET_TOKENS, VIDEO, Budget, BudgetRequest
from promprune_vllm.core.frames import split_over_frames
from promprune_vllm.core.policy import BudgetPolicy, MediaPolicy, Medium
from promprune_vllm.errors import BudgetError
from promprune_vllm.metrics.metric import FORMS

# An image of 576 tokens, a video of 7 frames of 100 tokens each, and an image of 100 tokens.
MEDIA = [Medium(IMAGE, 576), Medium(VIDEO, 700, frames=7), Medium(IMAGE, 100)]
# What a client may send with them, and what they keep where the default of images is 200, that of videos 20%.
KEPT: list[tuple[object, tuple[int, int, int]]] = [
    (64, (64, 64, 64)),
    (600, (576, 600, 100)),
    ("25%", (144, 175, 25)),
    ("full", (576, 700, 100)),
    ("auto", (200, 140, 100)),
    ({"per_frame": 32}, (200, 224, 100)),
    ({"per_frame": "32.0"}, (200, 224, 100)),
    ({"per_frame": 5000}, (200, 700, 100)),
    ([64, {"per_frame": 10}, "full"], (64, 70, 100)),
    (["auto", "auto", 1], (200, 140, 1)),
    ([1, "50%", "auto"], (1, 350, 100)),
    ({"total": 3}, (1, 1, 1)),
    ({"total": 688}, (288, 350, 50)),
    ({"total": 9999}, (576, 700, 100)),
]


@pytest.mark.parametrize(("value", "kept"), KEPT, ids=[str(value) for value, _ in KEPT])
def test_every_form_keeps_what_it_says(value: object, kept: tuple[int, int, int]) -> None:
    policy = MediaPolicy(BudgetPolicy(Budget(tokens=200)), BudgetPolicy(Budget(share=Fraction(1, 5))))
    assert policy.resolve_all(BudgetRequest.parse(value), MEDIA) == kept


def test_a_default_for_images_prunes_no_video() -> None:
    policy = MediaPolicy(images=BudgetPolicy(Budget(tokens=64), maximum=100))
    for nothing in ("auto", {"per_frame": MAX_BUDGET_TOKENS}):
        assert policy.resolve_all(BudgetRequest.parse(nothing), MEDIA) == (64, 700, 64)


def test_images_and_videos_have_limits_of_their_own() -> None:
    policy = MediaPolicy(BudgetPolicy(maximum=50), BudgetPolicy(minimum=80))
    assert policy.resolve_all(BudgetRequest.parse(60), MEDIA) == (50, 80, 50)
    assert policy.resolve_all(BudgetRequest(), MEDIA) == (50, 700, 50)


def test_a_refusal_says_whether_an_image_or_a_video_is_outside_the_limits() -> None:
    refusing = BudgetPolicy(minimum=100, out_of_range="refuse")
    for policy, kind in ((MediaPolicy(videos=refusing), "video"), (MediaPolicy(images=refusing), "image")):
        with pytest.raises(BudgetError, match=f"of this {kind}'s .* allows 100 or more tokens per {kind}"):
            policy.resolve_all(BudgetRequest.parse(64), MEDIA)


def test_the_level_lowers_what_a_video_keeps_without_a_budget() -> None:
    policy = MediaPolicy(videos=BudgetPolicy(floor=10))
    media = [Medium(VIDEO, 700, Fraction(1, 4), frames=7)]
    assert policy.resolve_all(BudgetRequest(), media) == (175,)
    assert policy.resolve_all(BudgetRequest.parse({"per_frame": 50}), media) == (350,)


def test_every_form_is_one_that_the_metrics_count() -> None:
    assert {BudgetRequest.parse(value).form for value, _ in KEPT} == set(FORMS)


REFUSED: list[tuple[object, list[str], str]] = [
    ({"per_frame": 8}, [IMAGE], r"the prompt has 1 image\(s\) and no video. Send tokens or a share"),
    ([8, {"per_frame": 8}], [VIDEO, IMAGE], r"_budget\[1\] is {'per_frame': 8}, but an image has no frames"),
    ([8], [IMAGE, VIDEO], r"has 1 entries, but the prompt has 1 image\(s\) and 1 video\(s\). Send one entry per"),
    ([8, 8, 8], [VIDEO, VIDEO], r"3 entries, but the prompt has 0 image\(s\) and 2 video\(s\)"),
    ({"total": 2}, [IMAGE, VIDEO, VIDEO], r"has 1 image\(s\) and 2 video\(s\) .* Send a total of 3 or more"),
]


@pytest.mark.parametrize(("value", "kinds", "complaint"), REFUSED, ids=[str(value) for value, _, _ in REFUSED])
def test_what_does_not_fit_the_prompt_is_refused_with_what_it_has(
    value: object, kinds: list[str], complaint: str
) -> None:
    with pytest.raises(BudgetError, match=complaint) as refused:
        BudgetRequest.parse(value).check_media(kinds)
    assert refused.value.reason == "images"


def test_what_fits_the_prompt_is_not_refused() -> None:
    for value, _ in KEPT:
        BudgetRequest.parse(value).check_media([each.kind for each in MEDIA])
    for value in (64, {"per_frame": 8}):
        BudgetRequest.parse(value).check_media([])


values = st.one_of(
    st.integers(1, MAX_BUDGET_TOKENS),
    st.sampled_from(["full", "auto", "25%", 0.5]),
    st.integers(1, MAX_BUDGET_TOKENS).map(lambda tokens: {"per_frame": tokens}),
)
media = st.one_of(
    st.integers(1, 20_000).map(lambda total: Medium(IMAGE, total)),
    st.builds(
        lambda frames, size: Medium(VIDEO, frames * size, frames=frames), st.integers(1, 64), st.integers(1, 900)
    ),
)


@given(
    st.one_of(
        values, st.lists(values, min_size=1, max_size=4), st.builds(lambda n: {"total": n}, st.integers(1, 9999))
    )
)
def test_what_is_printed_is_read_as_the_same(value: object) -> None:
    ask = BudgetRequest.parse(value)
    assert BudgetRequest.parse(json.loads(json.dumps(ask.printed()))) == ask


@given(st.lists(media, min_size=1, max_size=4), st.data())
def test_every_image_and_video_keeps_at_least_one_token_and_what_was_asked(
    prompt: list[Medium], data: st.DataObject
) -> None:
    each = [data.draw(values if medium.kind == VIDEO else values.filter(_has_no_frames)) for medium in prompt]
    kept = MediaPolicy().resolve_all(BudgetRequest.parse(each), prompt)
    for value, keep, medium in zip(each, kept, prompt, strict=True):
        assert 1 <= keep <= medium.total
        if isinstance(value, dict):
            assert keep == min(value["per_frame"] * medium.frames, medium.total)
        if isinstance(value, int):
            assert keep == min(value, medium.total)


def _has_no_frames(value: object) -> bool:
    return not isinstance(value, dict)


@given(st.integers(1, 200), st.integers(1, 300), st.data())
def test_a_videos_tokens_are_spread_evenly_over_its_frames(frames: int, size: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, frames * size))
    counts = split_over_frames(keep, frames, size)
    assert len(counts) == frames
    assert sum(counts) == keep
    assert set(counts) <= {keep // frames, -(-keep // frames)}
    assert max(counts) <= size
    # At no time is more than half a token too many or too few kept, seen from either end.
    for of_first, count in enumerate(accumulate(counts), start=1):
        assert abs(count - Fraction(keep * of_first, frames)) <= Fraction(1, 2)


@given(st.integers(1, 200), st.integers(1, 300), st.data())
def test_the_split_is_the_same_backwards_where_no_frame_is_on_the_edge(
    frames: int, size: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(0, frames * size))
    counts = split_over_frames(keep, frames, size)
    if all((keep * frame) % frames * 2 != frames for frame in range(frames)):
        assert counts == counts[::-1]


def test_the_split_in_numbers() -> None:
    assert split_over_frames(1, 7, 9) == (0, 0, 0, 1, 0, 0, 0)
    assert split_over_frames(3, 7, 9) == (0, 1, 0, 1, 0, 1, 0)
    assert split_over_frames(9, 7, 9) == (1, 2, 1, 1, 1, 2, 1)
    assert split_over_frames(63, 7, 9) == (9,) * 7
    assert split_over_frames(0, 1, 9) == (0,)


@pytest.mark.parametrize(("keep", "frames", "size"), [(-1, 2, 4), (9, 2, 4), (1, 0, 4)])
def test_what_cannot_be_split_is_refused(keep: int, frames: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"Cannot split {keep} tokens over {frames} frames of {size} tokens"):
        split_over_frames(keep, frames, size)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 8, "per_frame": 8},
        {"per_frame": 0},
        {"per_frame": MAX_BUDGET_TOKENS + 1},
        {"per_frame": 1, "share": Fraction(1)},
    ],
    ids=str,
)
def test_a_budget_is_one_of_three_things(wrong: dict[str, object]) -> None:
    with pytest.raises(BudgetError):
        Budget(**wrong)  # type: ignore[arg-type]
