"""A clip of 512 frames with a small budget: exactly K tokens enter the language model, and memory is bounded."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from promprune_vllm.core.frames import split_over_frames
from tests.clips import Clip
from tests.engine.family_engine import FamilyEngine
from tests.engine.videos import counted

pytestmark = [pytest.mark.engine, pytest.mark.release]
LONG = Clip(512)
KEPT = 64
MEBIBYTES = 768
"""More of memory than the clip and its features need. Attention among all patches at once would take gigabytes."""


@pytest.mark.parametrize("family", ["qwen2_5_vl"])  # timestamps of others would fill the tiny model's context
def test_a_long_clip_is_served_with_a_small_budget(family: str, models: dict[str, Path]) -> None:
    engine = FamilyEngine(family, models[family], max_model_len=4096, num_gpu_blocks_override=140)
    try:
        engine.generate([engine.ask(Clip(4), budget=9)], tokens=1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        request = engine.ask(LONG, budget=KEPT)
        ((_, total, kept),) = counted(engine, request)
        assert (total, kept) == (256 * 15, KEPT)
        engine.forget()
        engine.generate([request], tokens=2)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert [len(rows) for rows in engine.rows().values()] == [KEPT]
        (told,) = engine.told()
        assert told is not None
        places = sorted(place for part in told["parts"] for place in part["kept"])
        frames = total // len(told["parts"][0]["positions"])
        per_frame = [sum(at * frames // total == frame for at in places) for frame in range(frames)]
        assert per_frame == [*split_over_frames(KEPT, frames, total // frames)]
        assert grown < MEBIBYTES
    finally:
        engine.close()
