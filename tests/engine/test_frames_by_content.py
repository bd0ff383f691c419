"""Videos pruned by methods that compare frames and decide how many tokens each one keeps, in every layout.

Where text stands between frames, it comes with their rows; see ``text_between``. What the language model gets must
still be some of what it gets of the whole prompt, row by row, bit for bit, with the same positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from promprune_vllm import select
from promprune_vllm.engine.keys import SUMMARY
from tests.clips import Clip
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine
from tests.engine.test_families import engine  # noqa: F401  a fixture
from tests.engine.videos import (
    METHODS,
    check_it_is_part_of,
    counted,
    each_kind,
    each_layout,
    embedded,
    encoded,
    given,
    place,
    rendered,
    where,
)

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
each_method = pytest.mark.parametrize("name", METHODS)
CLIP = Clip(7, "tall")
MEDIA = ("tiny", CLIP, "portrait")


@pytest.fixture(autouse=True)
def takes_videos(engine: FamilyEngine) -> None:  # noqa: F811
    if "video" not in engine.modalities:
        pytest.skip("the family takes no videos")
    engine.forget()


def text_between(engine: FamilyEngine, clip: Clip) -> int:  # noqa: F811
    """Tokens of text between the first and the last visual token of a clip, unpruned."""
    prompt = rendered(engine, engine.ask(clip))
    start, end = place(prompt)
    return end - start - len(embedded(prompt))


def visual(engine: FamilyEngine, *media: str | Clip) -> list[int]:  # noqa: F811
    """Where the visual tokens of the one clip are in an unpruned prompt."""
    (found,) = rendered(engine, engine.ask(*media))["mm_placeholders"]["video"]
    return [i for start, last in found.extract_embeds_range() for i in range(start, last + 1)]


@each_kind
@each_method
def test_frames_keep_what_a_method_gives_them(engine: FamilyEngine, name: str) -> None:  # noqa: F811
    whole, at = given(engine, engine.ask(*MEDIA)), visual(engine, *MEDIA)
    features = encoded(engine, CLIP).joined().groups[0].features
    method = next(each for each in engine.model._methods if each.name == name)  # with the model's calibration
    shown = at[: features.tokens]  # a newline may follow, which shows nothing
    most = len(shown) - max(1, text_between(engine, CLIP))
    for budget in (1, len(at) // 5, most):
        request = engine.ask(*MEDIA, method=name, budget=["full", budget, "full"])
        assert ("video", len(at), budget) in counted(engine, request)
        some = check_it_is_part_of(whole, engine, request)
        found = {*where(some, whole, mrope=engine.mrope)}
        with torch.inference_mode():
            kept = select(features, budget, method).indices.tolist()
        assert [i for i, token in enumerate(shown) if token in found] == kept


@each_layout
def test_two_clips_around_an_image(engine: FamilyEngine) -> None:  # noqa: F811
    limit = engine.processor.info.get_supported_mm_limits()["video"]
    media = (CLIP, "tiny", Clip(7)) if limit != 1 else ("tiny", CLIP)
    whole = given(engine, engine.ask(*media))
    for budget in ([40, "full", "full"], [40, "full", 3], ["full", "full", 3]):
        chosen = budget if limit != 1 else ["full", 40]
        check_it_is_part_of(whole, engine, engine.ask(*media, budget=chosen, method=METHODS[-1]))


@each_layout
def test_what_a_video_was_pruned_by_is_part_of_its_key(engine: FamilyEngine) -> None:  # noqa: F811
    prompts = [rendered(engine, engine.ask(CLIP, budget=20, method=name)) for name in (None, *METHODS)]
    assert len({prompt["mm_hashes"]["video"][0] for prompt in prompts}) == len(prompts)
    assert {prompt[SUMMARY].images[0].kept for prompt in prompts} == {20}


@each_layout
@each_method
def test_text_between_frames_leaves_room_for_fewer_tokens(engine: FamilyEngine, name: str) -> None:  # noqa: F811
    """vLLM makes room for as many embeddings as an unpruned video has."""
    text, total = text_between(engine, CLIP), len(visual(engine, CLIP))
    if not text:
        assert counted(engine, engine.ask(CLIP, budget=total - 1, method=name)) == [("video", total, total - 1)]
        return
    prompt = rendered(engine, engine.ask(CLIP, budget=total - text, method=name))
    assert prompt[SUMMARY].images[0].kept == total - text
    assert prompt["mm_placeholders"]["video"][0].get_num_embeds() == total
    why = f"{text} tokens of text between the frames .* keeps at most {total - text};"
    with pytest.raises(VLLMValidationError, match=why) as refused:
        rendered(engine, engine.ask(CLIP, budget=total - text + 1, method=name))
    assert refused.value.parameter == "visual_token_budget"
    assert counted(engine, engine.ask(CLIP, budget=total, method=name)) == [("video", total, total)]


@pytest.mark.parametrize("engine", ["qwen3_vl"], indirect=True)
def test_a_video_with_more_text_than_visual_tokens_is_refused_at_any_budget(engine: FamilyEngine) -> None:  # noqa: F811
    clip = Clip(12, "portrait")
    assert text_between(engine, clip) > len(visual(engine, clip))
    with pytest.raises(VLLMValidationError, match="No budget is small enough; send another"):
        rendered(engine, engine.ask(clip, budget=1, method=METHODS[0]))


@each_layout
@each_method
def test_they_are_refused_where_there_is_nothing_to_compare(engine: FamilyEngine, name: str) -> None:  # noqa: F811
    def refusal(*media: str | Clip, budget: Any) -> str:
        with pytest.raises(VLLMValidationError, match="Send another visual_token_method") as refused:
            rendered(engine, engine.ask(*media, budget=budget, method=name))
        return str(refused.value)

    if "image" in engine.modalities:
        assert "an image has none" in refusal("tiny", budget=3)
        assert "an image has none" in refusal(Clip(7), "tiny", budget=["full", 3])
    assert "this one has a single frame" in refusal(Clip(2 if engine.mrope else 1), budget=3)
    whole = engine.ask("tiny", Clip(7), budget="full", method=name)
    assert all(kept == total for _, total, kept in counted(engine, whole))
