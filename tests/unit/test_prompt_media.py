"""The order of images and videos in a prompt, and what is remembered of videos."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import IMAGE, VIDEO, Budget, BudgetRequest
from promprune_vllm.core.policy import MediaPolicy
from promprune_vllm.engine.api_server.all_media import AllMedia, order_in_prompt, order_of_ranges
from promprune_vllm.engine.api_server.prompt_videos import PromptVideos, VideoShape
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan, Plan, ProcessedVideos
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.retry_plan import plan_retry
from tests.unit.test_named import Cache, Items

TEXTS = {IMAGE: "<image>", VIDEO: "<start><video>"}
SHAPE = VideoShape(4, 40, 40)


def decoded(tokens: Sequence[int], **_: Any) -> str:
    return "".join({1: "<image>", 2: "<start><video>"}.get(token, "?") for token in tokens)


@pytest.mark.parametrize(
    ("prompt", "counts", "order"),
    [
        ("x<start><video>y<image><image>", {IMAGE: 2, VIDEO: 1}, [(VIDEO, 0), (IMAGE, 0), (IMAGE, 1)]),
        ([1, 7, 2, 2], {IMAGE: 1, VIDEO: 2}, [(IMAGE, 0), (VIDEO, 0), (VIDEO, 1)]),
        ("as text: <image>, then <image><start><video>", {IMAGE: 1, VIDEO: 1}, None),
    ],
)
def test_the_order_is_that_of_what_stands_for_them_in_the_prompt(prompt: Any, counts: Any, order: Any) -> None:
    assert order_in_prompt(prompt, counts, TEXTS, decoded) == order


def test_the_order_of_ranges_is_that_of_their_offsets() -> None:
    ranges = {
        kind: [SimpleNamespace(offset=at) for at in each] for kind, each in ((IMAGE, (9, 30)), (VIDEO, (20,)))
    }
    assert order_of_ranges(ranges) == [(IMAGE, 0), (VIDEO, 0), (IMAGE, 1)]


def decided(videos: PromptVideos, budget: object) -> PromptVideos:
    every = AllMedia({VIDEO: videos}, [(VIDEO, i) for i in range(videos.get_count())])
    every.decide_levels(
        BudgetRequest.parse(budget), MediaPolicy(), {IMAGE: Fraction(1), VIDEO: Fraction(1)}, adapts=True
    )
    return videos


def test_a_video_is_processed_first_only_if_it_may_lose_tokens_of_an_unknown_number() -> None:
    cache = Cache()
    clip = Items(object(), object())
    assert decided(PromptVideos(clip, None, Cache("a"), ["a", "b"]), ["full", 9]).to_process == [1]
    assert decided(PromptVideos(clip, None, cache, ["a", "b"]), ["full", 9]).to_process == [
        0,
        1,
    ]  # vLLM asks for both
    assert decided(PromptVideos(clip, None, cache, ["a", "b"]), "auto").to_process == []
    videos = decided(PromptVideos(clip, None, cache, ["a", "b"]), {"total": 9})
    assert videos.to_process == [0, 1]
    videos.learn(0, SHAPE)
    videos.remember([False, False])
    assert videos.to_process == [1]
    assert decided(PromptVideos(clip, None, cache, ["a", "c"]), 9).sizes == [SHAPE, None]
    assert decided(PromptVideos(clip, None, Cache(), ["a", "b"]), 9).to_process == [0, 1]
    assert decided(PromptVideos(clip, None, None, ["a", "b"]), 9).to_process == [0, 1]
    # Without a cache, vLLM asks for all of them, so all are processed at once.
    assert decided(PromptVideos(clip, None, None, ["a", "b"]), ["full", 9]).to_process == [0, 1]
    assert decided(PromptVideos(clip, None, None, ["a", "b"]), "full").to_process == []
    named = Items(None, object())  # refused later, since nothing is remembered
    assert decided(PromptVideos(named, ["u", None], None, ["u", "b"]), ["full", 9]).to_process == [1]


def test_a_uuid_may_be_given_to_another_video_once_the_first_is_not_in_the_cache() -> None:
    cache, clip = Cache("in the cache"), Items(object())
    first = decided(PromptVideos(clip, ["u"], cache, ["u"]), 9)
    first.learn(0, SHAPE)
    assert first.unsure(["k"], cache) == []
    first.remember([False])
    for budget in (9, 10_000):  # of which the first one kept all its tokens
        second = decided(PromptVideos(clip, ["u"], cache, ["u"]), budget)
        assert second.to_process == []
        assert second.unsure(["in the cache"], cache) == []
        assert second.unsure(["k"], cache) == [0]
    assert decided(PromptVideos(clip, ["u"], cache, ["u"]), "full").unsure(["k"], cache) == []
    assert decided(PromptVideos(clip, [None], cache, ["u"]), 9).unsure(["k"], cache) == []
    assert decided(PromptVideos(Items(None), ["u"], cache, ["u"]), 9).unsure(["k"], cache) == []


def test_what_was_processed_is_used_for_the_same_videos_only() -> None:
    plan = Plan({VIDEO: (ImagePlan(9, 4), ImagePlan(9, 9))}, processed=ProcessedVideos((0, 1), {}))
    assert plan.take({VIDEO: [0, 1]}).processed is plan.processed
    assert plan.take({VIDEO: [1]}).processed is None
    assert plan.take({VIDEO: [1]}).media == {VIDEO: (ImagePlan(9, 9),)}


@pytest.mark.parametrize(("to", "again"), [("full", 100), ("99%", 70), (40, 40), (10, None)])
def test_a_second_try_leaves_room_for_the_text_between_frames(to: Any, again: int | None) -> None:
    """A budget that would be refused is none that a server may choose."""
    plan = ImagePlan(100, 30, kind=VIDEO, between=30)
    retry = plan_retry(Settings(escalate=0.9, escalate_to=str(to)), PruningRequest(), [plan], [(VIDEO, 0)])
    assert (retry and retry.request.budget.each) == (again and (Budget(tokens=again),))
