"""Budgets of requests with videos: what each image and video keeps, what is refused, what is processed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from promprune_vllm.config import Settings
from promprune_vllm.planning.facts import read
from tests.clips import CLIP_SHAPES, Clip
from tests.engine import naming
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine
from tests.engine.test_families import engine  # noqa: F401  a fixture
from tests.engine.videos import counted, each_layout, each_layout_with_images, rendered

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
CLIP = Clip(7)
Calls = list[int]  # videos of each call of the Hugging Face processor


@pytest.fixture(autouse=True)
def forgotten(engine: FamilyEngine) -> None:  # noqa: F811
    """A prompt that is rendered only is in the cache of the API server's side, and not in the engine's."""
    engine.forget()


@pytest.fixture
def calls(engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch) -> Calls:  # noqa: F811
    """How many videos the Hugging Face processor was given in each call, from now on and with empty caches."""
    seen: Calls = []
    context = type(engine.processor.info.ctx)
    original = context.call_hf_processor

    def call(self: Any, hf_processor: Any, data: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        videos = data.get("videos")
        if videos is not None and len(videos):
            seen.append(len(videos) if isinstance(videos, list) else 1)  # some are processed one by one
        return original(self, hf_processor, data, *args, **kwargs)

    monkeypatch.setattr(context, "call_hf_processor", call)
    engine.forget()
    return seen


def key(engine: FamilyEngine, request: dict[str, Any]) -> str:  # noqa: F811
    """A clip's key in every cache."""
    (found,) = rendered(engine, request)["mm_hashes"]["video"]
    return str(found)


def total(engine: FamilyEngine, clip: Clip = CLIP) -> int:  # noqa: F811
    """The tokens of a clip."""
    ((_, tokens, _),) = counted(engine, engine.ask(clip))
    return tokens


def frames(engine: FamilyEngine, clip: Clip = CLIP) -> int:  # noqa: F811
    """The frames of a clip as the model has them, as its grid says."""
    engine.forget()
    (item,) = rendered(engine, engine.ask(clip))["mm_kwargs"]["video"]
    values = item.get_data()
    if "video_grid_thw" in values:
        return int(values["video_grid_thw"][0])
    return (
        int(values["video_num_patches"]) if "video_num_patches" in values else len(values["pixel_values_videos"])
    )


@each_layout
def test_a_clip_is_processed_once_for_each_number_of_tokens(engine: FamilyEngine, calls: Calls) -> None:  # noqa: F811
    for budget, processed in ((9, 1), (9, 0), (12, 1), ("full", 1), (None, 0), (9, 0), (12, 0)):
        rendered(engine, engine.ask(CLIP, budget=budget))
        assert sum(calls) == processed, budget
        calls.clear()


@each_layout
def test_a_plan_counts_a_clip_as_the_engine_does(engine: FamilyEngine, models: dict[str, Path]) -> None:  # noqa: F811
    facts = read(str(models[engine.family]))
    for clip in (CLIP, Clip(4, "portrait")):
        size = CLIP_SHAPES[clip.shape]
        assert facts.video_grid(clip.frames, *size)[0] == frames(engine, clip)
        assert facts.video_tokens(clip.frames, *size) == total(engine, clip)


@each_layout
def test_a_clip_that_keeps_everything_is_processed_by_vllm_alone(
    engine: FamilyEngine,  # noqa: F811
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(engine.processor, "video_shape", never)
    for budget in (None, "full", "auto", ["full"], "100%"):
        assert counted(engine, engine.ask(CLIP, budget=budget))[0][1:] == (total(engine),) * 2
    assert calls == [1]


@each_layout
def test_each_number_of_tokens_has_one_entry_in_the_caches(engine: FamilyEngine) -> None:  # noqa: F811
    everything = total(engine)
    own = key(engine, engine.ask(CLIP))
    assert key(engine, engine.ask(CLIP, budget="full")) == own
    assert key(engine, engine.ask(CLIP, budget=everything + 1)) == own
    quarter = -(-everything // 4)
    same = [quarter, "25%", 0.25, {"total": quarter}, [quarter]]
    keys = {key(engine, engine.ask(CLIP, budget=budget)) for budget in same}
    assert len(keys) == 1
    others = [own, *(key(engine, engine.ask(CLIP, budget=n)) for n in (quarter - 1, quarter + 1))]
    assert len(keys.union(others)) == 4
    assert key(engine, engine.ask(Clip(7, "portrait"), budget=quarter)) not in keys


@each_layout
def test_of_two_clips_each_is_processed_once(engine: FamilyEngine, calls: Calls) -> None:  # noqa: F811
    if engine.processor.info.get_supported_mm_limits()["video"] == 1:
        pytest.skip("the family takes one video")
    for budget in (["full", 5], [5, "full"], {"total": 9}):
        engine.forget()
        for processed in (2, 0):
            rendered(engine, engine.ask(CLIP, Clip(2), budget=budget))
            assert sum(calls) == processed, budget
            calls.clear()


@each_layout
def test_without_a_processor_cache(
    engine: FamilyEngine,  # noqa: F811
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    several = engine.processor.info.get_supported_mm_limits()["video"] != 1
    requests = [engine.ask(CLIP, budget=9), engine.ask("tiny", CLIP, budget=["full", 9])]
    if several:
        requests += [engine.ask(CLIP, Clip(2), budget=budget) for budget in (["full", 5], [5, "full"], 6, None)]
    cached = [rendered(engine, request) for request in requests]
    calls.clear()
    renderer = engine.llm.llm_engine.input_processor.renderer
    monkeypatch.setattr(renderer, "_mm_processor_cache", None)
    for request, expected in zip(requests, cached, strict=True):
        for _ in range(2):
            found = rendered(engine, request)
            assert found["prompt_token_ids"] == expected["prompt_token_ids"]
            assert found["mm_hashes"] == expected["mm_hashes"]
            assert [len(items) for items in found["mm_kwargs"].values()] == [
                len(places) for places in found["mm_placeholders"].values()
            ]
    assert calls[:4] == [1] * 4
    assert sum(calls[4:]) == (2 * 4 * 2 if several else 0), "each clip of the others is processed once"
    with pytest.raises(VLLMValidationError, match=r"caches no videos .* send the video itself"):
        rendered(engine, naming.named(naming.sent(lambda: engine.ask(CLIP), 9)))


@pytest.mark.parametrize("engine", ["qwen2_5_vl", "internvl_chat"], indirect=True)
@pytest.mark.parametrize("check", naming.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_a_clip_that_is_named_and_not_sent(engine: FamilyEngine, check: Callable[..., None]) -> None:  # noqa: F811
    check(engine, lambda: engine.ask(CLIP))


@pytest.mark.parametrize("engine", ["qwen2_5_vl", "internvl_chat"], indirect=True)
def test_of_named_clips_none_is_taken_for_another(engine: FamilyEngine) -> None:  # noqa: F811
    naming.check_another_image_is_never_served(engine, lambda: engine.ask(CLIP), lambda: engine.ask(Clip(4)))
    naming.check_some_of_several_are_named(engine, lambda: engine.ask(CLIP, Clip(4)))
    naming.answer(engine, naming.sent(lambda: engine.ask(CLIP), 7, uuids=("U",)))
    other = naming.sent(lambda: engine.ask(Clip(4)), 11, uuids=("U",))  # with 11 tokens, no clip is in the cache
    for request in (other, {**other, "mm_processor_kwargs": {"visual_token_budget": "25%"}}):
        expected = {**request, "multi_modal_uuids": {}}
        assert rendered(engine, request)["prompt_token_ids"] == rendered(engine, expected)["prompt_token_ids"]


@each_layout_with_images
def test_the_order_of_appearance_decides(engine: FamilyEngine) -> None:  # noqa: F811
    for media, kinds in (((CLIP, "tiny"), ["video", "image"]), (("tiny", CLIP), ["image", "video"])):
        request = engine.ask(*media, budget=[3, 2])
        as_tokens = {
            **request,
            "prompt_token_ids": engine.llm.get_tokenizer().encode(request["prompt"], add_special_tokens=False),
        }
        del as_tokens["prompt"]
        for each in (request, as_tokens):
            assert [(kind, kept) for kind, _, kept in counted(engine, each)] == list(
                zip(kinds, (3, 2), strict=True)
            )


@each_layout_with_images
def test_budgets_per_frame_and_for_all_together(engine: FamilyEngine) -> None:  # noqa: F811
    everything, count = total(engine), frames(engine)
    (image,) = counted(engine, engine.ask("portrait"))
    for per_frame in (1, 2, 10_000):
        kept = min(per_frame * count, everything)
        asked = engine.ask("portrait", CLIP, budget={"per_frame": per_frame})
        assert counted(engine, asked) == [image, ("video", everything, kept)]
        listed = engine.ask(CLIP, "portrait", budget=[{"per_frame": per_frame}, 5])
        assert counted(engine, listed) == [("video", everything, kept), (*image[:2], 5)]
    for media in (("portrait", CLIP), (CLIP, "portrait")):
        found = counted(engine, engine.ask(*media, budget={"total": 30}))
        assert sum(kept for _, _, kept in found) == 30
        assert all(1 < kept < tokens for _, tokens, kept in found)


@each_layout_with_images
def test_what_does_not_fit_is_refused_and_the_engine_goes_on(engine: FamilyEngine) -> None:  # noqa: F811
    for media, budget, said in (
        (("tiny", CLIP), [5], "has 1 entries, but the prompt has 1 image.* and 1 video"),
        (("tiny", CLIP), [5, 6, 7], "has 3 entries"),
        (("tiny",), {"per_frame": 2}, "no video"),
        (("tiny", CLIP), [{"per_frame": 2}, 5], r"\[0\] is .*an image has no frames"),
        (("tiny", CLIP), {"total": 1}, "each keeps at least one"),
        ((CLIP,), {"per_frame": 0}, "per_frame"),
    ):
        with pytest.raises(VLLMValidationError, match=said):
            engine.generate([engine.ask(*media, budget=budget)], tokens=1)
    (output,) = engine.generate([engine.ask("tiny", CLIP, budget=[5, 6])], tokens=1)
    assert len(output.outputs[0].token_ids) == 1


@each_layout_with_images
def test_a_servers_defaults_for_images_and_for_videos_are_apart(
    engine: FamilyEngine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kept(**environment: str) -> list[int]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(f"PROMPRUNE_{name}", value)
            patch.setattr(engine.processor, "_policy", Settings.from_environment().media_policy())
            return [kept for _, _, kept in counted(engine, engine.ask("portrait", CLIP))]

    image, video = kept()
    assert kept(BUDGET="4") == [4, video]
    assert kept(MAX="4") == [4, video]
    assert kept(VIDEO_BUDGET="6") == [image, 6]
    assert kept(VIDEO_MAX="5") == [image, 5]
    assert kept(BUDGET="4", VIDEO_BUDGET="50%", VIDEO_MIN="7") == [4, -(-video // 2)]


@each_layout
def test_a_video_that_the_encoder_was_not_profiled_for_is_refused(
    engine: FamilyEngine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = total(engine)
    for limit, budget in ((tokens, 5), (tokens - 1, 5), (5, 5)):
        monkeypatch.setattr(engine.llm.llm_engine.input_processor, "mm_encoder_cache_size", limit)
        engine.forget()
        if limit == tokens:
            engine.generate([engine.ask(CLIP, budget=budget)], tokens=1)
            continue
        with pytest.raises(VLLMValidationError, match=f"of {tokens} tokens is too long, .* {limit} tokens at"):
            engine.generate([engine.ask(CLIP, budget=budget)], tokens=1)
