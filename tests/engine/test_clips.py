"""Prompts with a video, which nobody prunes: vLLM's answers, and how clips of the tests arrive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.clips import FPS, Clip
from tests.engine import stock
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine
from tests.engine.test_families import engine  # noqa: F401  a fixture
from tests.engine.videos import each_kind

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES


@each_kind
def test_a_clip_between_images_is_answered_as_by_stock_vllm(
    engine: FamilyEngine,  # noqa: F811
    stock_answers: dict[str, Any],
) -> None:
    if "video" not in engine.modalities:
        pytest.skip("the family takes no videos")
    assert "promprune" in type(engine.model).__module__
    engine.forget()
    for _ in ("encoded", "cached"):
        (output,) = engine.generate([engine.ask(*stock.media(engine)[stock.CLIP])])
        assert stock.answer(output) == stock_answers[engine.family][stock.CLIP]


@pytest.mark.parametrize("shape", ["landscape", "portrait"])
@pytest.mark.parametrize("url", [Clip.mp4_url, Clip.frames_url], ids=["mp4", "frames"])
def test_vllm_finds_every_frame_behind_a_clips_url(url: Any, shape: str) -> None:
    from vllm.multimodal.media import MediaConnector

    clip = Clip(7, shape)
    found, told = MediaConnector().fetch_video(url(clip)).media
    assert found.shape == clip.pixels.shape
    # Swapped colors or frames differ by more than 20.
    assert np.abs(found.astype(int) - clip.pixels.astype(int)).mean() < 12
    assert told["frames_indices"] == list(range(7))
    assert told["fps"] == (FPS if url is Clip.mp4_url else 1)
