"""What the inspector tells of a clip, for every family that takes videos: its frames, and what each one keeps."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from promprune_vllm.core.frames import split_over_frames
from promprune_vllm.engine.api_server.inspected_reply import reply
from promprune_vllm.engine.api_server.inspector import Inspection
from promprune_vllm.engine.api_server.seen_frames import SeenFrames
from promprune_vllm.server.inspect_schemas import InspectReply
from promprune_vllm.server.schemas import Method
from promprune_vllm.server.usage import ImageUsage
from tests.clips import Clip
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine
from tests.engine.family_facts import CROPPED_FRAMES
from tests.engine.test_families import engine  # noqa: F401  a fixture
from tests.engine.videos import counted, each_kind, each_layout

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
CLIP = Clip(7)


@pytest.fixture(autouse=True)
def takes_videos(engine: FamilyEngine) -> None:  # noqa: F811
    if "video" not in engine.modalities:
        pytest.skip("the family takes no videos")
    engine.forget()


def seen_frames(engine: FamilyEngine, request: dict[str, Any]) -> SeenFrames:  # noqa: F811
    renderer = engine.llm.llm_engine.input_processor.renderer
    (prompt,) = renderer.render_cmpl([request], skip_mm_cache=True)
    frames: SeenFrames = engine.processor.seen_frames(prompt["mm_kwargs"]["video"][0])
    return frames


def inspected(engine: FamilyEngine, request: dict[str, Any]) -> InspectReply:  # noqa: F811
    """What the route makes of a prompt with one clip, once the engine has answered it."""
    engine.generate([request], tokens=1)
    (trace,) = engine.told()
    assert trace is not None
    ((_, total, kept),) = counted(engine, request)
    found = Inspection(ImageUsage(images=[(total, kept)]), trace, frames=seen_frames(engine, request))
    names = [Method(name=each.name, options={}) for each in engine.model._methods]
    return reply(found, engine.processor.boxes, names, None, pictures=True)


@each_kind
def test_frames_are_those_of_the_clip(engine: FamilyEngine) -> None:  # noqa: F811
    request = engine.ask(CLIP)
    frames = seen_frames(engine, request)
    ((_, total, _),) = counted(engine, engine.ask(CLIP, budget="99%"))
    rows, columns = frames.grid
    merged = math.ceil(len(CLIP.pixels) / len(frames.pixels))
    assert (merged, total // (rows * columns)) in {(1, 7), (2, 4)}  # a newline may follow
    assert len(frames.boxes()) == rows * columns
    assert frames.boxes()[-1][2:] == pytest.approx(frames.size)
    for n, (url, pixels) in enumerate(zip(frames.pictures(), frames.pixels, strict=True)):
        source = Image.fromarray(CLIP.pixels[n * merged])
        crops = engine.family in CROPPED_FRAMES
        source = ImageOps.fit(source, frames.size) if crops else source.resize(frames.size)
        # Swapped colors, cells or frames differ by more than 20.
        assert np.abs(pixels.numpy().astype(int) - np.asarray(source).astype(int)).mean() < 6
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
            assert picture.size == frames.size
            assert np.abs(np.asarray(picture).astype(int) - pixels.numpy().astype(int)).mean() < 12


@each_kind
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_each_frame_tells_which_of_its_tokens_it_keeps(engine: FamilyEngine, share: float) -> None:  # noqa: F811
    told = inspected(engine, engine.ask(CLIP, budget=share))
    assert told.frames is not None
    each = len(told.boxes)
    assert told.kept == math.ceil(share * told.seen)
    assert told.views == [n * each for n in range(len(told.frames))]
    assert [len(frame.kept) for frame in told.frames] == [*split_over_frames(told.kept, len(told.frames), each)]
    kept = [n * each + token for n, frame in enumerate(told.frames) for token in frame.kept]
    assert kept == told.indices
    assert [group.kept for group in told.groups] == [
        [n * each + token for token in frame.kept] for n, frame in enumerate(told.frames) if frame.kept
    ]
    engine.forget()
    whole = inspected(engine, engine.ask(CLIP))
    assert [frame.kept for frame in whole.frames or ()] == [[*range(each)] for _ in told.frames]
    assert (whole.method, whole.groups) == (None, [])


@each_layout
def test_methods_that_compare_frames_tell_one_group(engine: FamilyEngine) -> None:  # noqa: F811
    request = engine.ask(Clip(7, "tall"), budget=0.2)  # text between frames leaves room for it
    request["mm_processor_kwargs"]["visual_token_method"] = "evs"
    told = inspected(engine, request)
    assert told.frames is not None
    assert told.method is not None
    assert (told.method.name, len(told.groups)) == ("evs", 1)
    counts = [len(frame.kept) for frame in told.frames]
    assert sum(counts) == told.kept
    assert len({*counts}) > 1, "the frames differ, so they keep different numbers"
