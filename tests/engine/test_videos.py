"""Videos with a budget: the rows and positions that the language model gets, in steps of any size.

What the language model gets of a pruned prompt must be some of what it gets of the whole one, row by row, bit for
bit, with the positions that the rows have there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promprune_vllm import Need
from promprune_vllm.core.frames import split_over_frames
from promprune_vllm.engine.worker import pruned_model
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.selected_tokens import select_tokens
from tests.clips import Clip
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine
from tests.engine.storing import evict, storing
from tests.engine.test_families import ROUNDING, difference, engine  # noqa: F401  a fixture
from tests.engine.videos import (
    METHODS,
    SPLITS,
    check_it_is_part_of,
    counted,
    each_kind,
    each_layout,
    each_split,
    encoded,
    given,
    place,
    rendered,
)

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES


@pytest.fixture(autouse=True)
def takes_videos(engine: FamilyEngine) -> None:  # noqa: F811
    if "video" not in engine.modalities:
        pytest.skip("the family takes no videos")
    engine.forget()


@each_kind
@pytest.mark.parametrize("shape", ["landscape", "portrait"])
def test_the_model_gets_exactly_k_of_the_rows_each_at_its_place(
    engine: FamilyEngine,  # noqa: F811
    shape: str,
) -> None:
    media = ("tiny", Clip(7, shape), "portrait")
    whole = given(engine, engine.ask(*media))
    (total,) = (all_ for kind, all_, _ in counted(engine, engine.ask(*media)) if kind == "video")
    for kept in (1, total // 5, total - 1):
        request = engine.ask(*media, budget=["full", kept, "full"])
        assert ("video", total, kept) in counted(engine, request)
        check_it_is_part_of(whole, engine, request)


@each_layout
@pytest.mark.parametrize("frames", [1, 2, 64])
def test_short_and_long_clips_beside_a_pruned_image(engine: FamilyEngine, frames: int) -> None:  # noqa: F811
    if frames == 1 and engine.mrope:
        pytest.skip("the family takes no clip of one frame")
    media = ("portrait", Clip(frames, "portrait"))
    whole = given(engine, engine.ask(*media))
    for budget in ([9, 11], ["full", {"per_frame": 2}], [1, "full"], {"total": 50}):
        check_it_is_part_of(whole, engine, engine.ask(*media, budget=budget))


@each_layout
def test_two_clips_around_an_image(engine: FamilyEngine) -> None:  # noqa: F811
    limit = engine.processor.info.get_supported_mm_limits()["video"]
    media = (Clip(2, "portrait"), "tiny", Clip(7)) if limit != 1 else ("tiny", Clip(7))
    whole = given(engine, engine.ask(*media))
    for budget in ([5, 3, 9][-len(media) :], 7, ["full", 3, 9][-len(media) :], [4, "full", "full"][-len(media) :]):
        check_it_is_part_of(whole, engine, engine.ask(*media, budget=budget))


@each_layout
@pytest.mark.parametrize("fps", [0.7, 3.3])
def test_the_seconds_between_frames_count(engine: FamilyEngine, fps: float) -> None:  # noqa: F811
    """Positions in time follow them in Qwen2-VL and Qwen2.5-VL, and text between frames elsewhere."""
    clip = Clip(9)
    pixels, told = clip.item
    requests = [engine.ask(clip, budget=budget) for budget in ("full", 17)]
    for request in requests:
        request["multi_modal_data"] = {"video": [(pixels, {**told, "fps": fps, "duration": clip.frames / fps})]}
    check_it_is_part_of(given(engine, requests[0]), engine, requests[1])


@each_layout
@each_split
def test_a_step_may_end_inside_a_clip(
    engine: FamilyEngine,  # noqa: F811
    clip: Clip,
    budget: int,
    method: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_image = 20 if method is None else "full"
    request = engine.ask("portrait", clip, budget=[of_image, budget], method=method, before="Some text. ")
    at_once = given(engine, request)
    for chunk in (16, 31, 48):
        monkeypatch.setattr(engine.core.scheduler, "max_num_scheduled_tokens", chunk)
        assert given(engine, request) == at_once


@each_layout
@each_split
@pytest.mark.parametrize("lost", [False, True], ids=["rows kept", "rows lost"])
def test_a_prefix_hit_may_end_inside_a_clip(
    engine: FamilyEngine,  # noqa: F811
    clip: Clip,
    budget: int,
    method: str | None,
    lost: bool,
) -> None:
    def ask(pad: int, text: str) -> dict[str, Any]:
        return engine.ask(clip, budget=budget, method=method, before="x" * pad, text=text)

    def hit(pad: int) -> int:
        first, second = (rendered(engine, ask(pad, text))["prompt_token_ids"] for text in ("What?", "Other?"))
        common = next(i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
        return common // engine.block * engine.block

    pad = next(n for n in range(engine.block) if hit(n) < place(rendered(engine, ask(n, "What?")))[1])
    start, end = place(rendered(engine, ask(pad, "Other?")))
    cold = given(engine, ask(pad, "Other?"))
    engine.forget()
    given(engine, ask(pad, "What?"))
    if lost:
        engine.core.reset_encoder_cache()
    again = given(engine, ask(pad, "Other?"), hot=True)
    assert start < again.cached == hit(pad) < end
    assert again == cold
    assert (again.tower_calls > 0) == lost


@pytest.mark.parametrize(
    ("engine", "split"), [("qwen2_5_vl", "evenly"), ("qwen3_vl", METHODS[-1])], indirect=["engine"]
)
def test_requests_with_clips_that_are_preempted_answer_as_alone(
    engine: FamilyEngine,  # noqa: F811
    split: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three begin with 21 blocks each, which is all there are, and soon need one more."""
    clip, budget, method = SPLITS[split]

    def ask(number: int) -> dict[str, Any]:
        request = engine.ask(clip, budget=budget + number, method=method, text=f"{number}?")
        missing = 21 * engine.block - 2 - len(rendered(engine, request)["prompt_token_ids"])
        return {**request, "prompt": request["prompt"] + "x" * missing}

    asks = [ask(number) for number in range(3)]
    assert {len(rendered(engine, each)["prompt_token_ids"]) for each in asks} == {21 * engine.block - 2}
    preempted = []
    original = engine.core.scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        original(request, *args, **kwargs)

    monkeypatch.setattr(engine.core.scheduler, "_preempt_request", preempt)
    engine.forget()
    alone = [engine.generate([each])[0].outputs[0].token_ids for each in asks]
    assert not preempted
    engine.forget()
    together = engine.generate(asks)
    assert preempted
    assert [output.outputs[0].token_ids for output in together] == alone


@each_layout
def test_mixed_batches_equal_one_by_one_and_a_failed_clip_ends_alone(
    engine: FamilyEngine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asks = [
        engine.ask(Clip(7), text="a?"),
        engine.ask("landscape", budget=9, text="b?"),
        engine.ask("tiny", Clip(7, "portrait"), budget=[5, 20], text="c?"),
        engine.ask("portrait", text="d?"),
        engine.ask(Clip(2), budget=4, text="e?"),
        engine.ask("tiny", Clip(7, "tall"), budget=["full", 30], method=METHODS[0], text="f?"),
        engine.ask("tiny", Clip(7, "tall"), budget=["full", 31], method=METHODS[0], text="g?"),
    ]
    alone = [engine.generate([ask])[0] for ask in asks]
    engine.forget()
    for one, batched in zip(alone, engine.generate(asks), strict=True):
        assert one.outputs[0].token_ids == batched.outputs[0].token_ids
        assert difference(one, batched) < ROUNDING

    original = pruned_model.select_tokens

    def select(image: EncodedImage, keep: int, method: Any) -> Any:
        if image.is_video and keep in {20, 31}:
            raise RuntimeError("no luck")
        return original(image, keep, method)

    engine.forget()
    monkeypatch.setattr(pruned_model, "select_tokens", select)
    ends = [output.outputs[0].finish_reason for output in engine.generate(asks)]
    assert ends == ["length", "length", "error", "length", "length", "length", "error"]


@each_layout
def test_another_budget_does_not_encode_a_stored_clip_again(engine: FamilyEngine) -> None:  # noqa: F811
    clip = Clip(7, "tall")
    asks = [engine.ask("tiny", clip, budget=budget) for budget in (20, 33, {"per_frame": 2}, None)]
    asks += [engine.ask("tiny", clip, budget=["full", 33], method=method) for method in METHODS]
    expected = [given(engine, request) for request in asks]
    with storing(engine) as store:
        for i, request in enumerate([*asks, asks[0]]):
            evict(engine)
            again = given(engine, request, hot=True)
            assert again == expected[i % len(asks)]
            assert again.tower_calls == (0 if i else expected[0].tower_calls)
        assert len(store) == len(counted(engine, asks[0]))


@pytest.mark.parametrize("engine", ["qwen2_5_vl", "internvl_chat", "llava_onevision"], indirect=True)
@pytest.mark.parametrize("frames", [7, 2, 1], ids="{} frames".format)
def test_every_method_selects_of_each_frame_as_of_an_image(engine: FamilyEngine, frames: int) -> None:  # noqa: F811
    """Two frames are one to Qwen's tower, and then as an image. Of methods that read the text, only the count."""
    if frames == 1 and engine.mrope:
        pytest.skip("the family takes no clip of one frame")
    clip = Clip(frames)
    video = encoded(engine, clip)
    frame_of = [EncodedImage.whole(video.rows[group.positions], group.features) for group in video.groups]
    budget = 2 * len(frame_of) + 1
    counts = split_over_frames(budget, len(frame_of), len(frame_of[0].rows))
    for method in engine.model._methods:
        if method.over_frames:
            continue
        request = engine.ask(clip, budget=budget)
        request["mm_processor_kwargs"]["visual_token_method"] = method.name
        (found,) = rendered(engine, request)["mm_placeholders"]["video"]
        assert found.get_num_embeds() == budget
        some = given(engine, request)
        visual = torch.ones(found.length, dtype=torch.bool) if found.is_embed is None else found.is_embed
        rows = some.rows[found.offset : found.offset + found.length][visual]
        if not method.needs & Need.TEXT:
            with torch.inference_mode():
                expected = [
                    select_tokens(frame, count, method).rows(engine.model.project)[0]
                    for frame, count in zip(frame_of, counts, strict=True)
                ]
            assert torch.equal(rows, torch.cat(expected)), method.name
