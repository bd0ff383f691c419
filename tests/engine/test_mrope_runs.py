"""M-RoPE with several runs in a feature, such as the frames of a video: each has a start and cells of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.multimodal.inputs import PlaceholderRange

from promprune_vllm import VisionFeatures
from promprune_vllm.engine.worker.encoded_image import EncodedImage, Group
from tests.engine.family_engine import FamilyEngine
from tests.engine.test_mrope import processed

pytestmark = pytest.mark.engine
FRAMES, HEIGHT, WIDTH = 3, 4, 6  # in tokens of 32 pixels
KEEP = ([5, 0, 23], [1], [7, 8, 22, 3])  # of each frame's 24 tokens


@pytest.fixture(scope="module")
def engine(models: dict[str, Path]) -> Any:
    found = FamilyEngine("qwen3_vl", models["qwen3_vl"], limit_mm_per_prompt={"image": 1, "video": 1})
    yield found
    found.close()


def video(engine: FamilyEngine) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 255, (2 * FRAMES, 32 * HEIGHT, 32 * WIDTH, 3), dtype=np.uint8)
    told = {"fps": 2.0, "duration": FRAMES, "total_num_frames": 2 * FRAMES, "video_backend": "opencv"}
    told |= {"frames_indices": list(range(2 * FRAMES)), "do_sample_frames": False}
    return {
        "prompt": f"See: {type(engine.model).get_placeholder_str('video', 0)} and say.",
        "multi_modal_data": {"video": [(pixels, told)]},
    }


def pruned(prompt: list[int], feature: Any) -> tuple[list[int], Any, list[int]]:
    """A prompt with a few tokens of each frame, its feature, and where its tokens stand in the unpruned one."""
    place = feature.mm_position
    runs = place.extract_embeds_range()
    assert [last + 1 - first for first, last in runs] == [HEIGHT * WIDTH] * FRAMES
    columns = list(range(len(prompt)))
    for (first, last), keep in reversed([*zip(runs, KEEP, strict=True)]):
        columns[first : last + 1] = [first + cell for cell in sorted(keep)]
    tokens = [prompt[column] for column in columns]
    end = place.offset + place.length
    mask = [bool(place.is_embed[column - place.offset]) for column in columns if place.offset <= column < end]
    shorter = PlaceholderRange(place.offset, len(mask), torch.tensor(mask))
    return tokens, replace(feature, mm_position=shorter), columns


def encoded() -> tuple[EncodedImage, torch.Tensor]:
    """A video as an image with a group for each frame, and which of its tokens are kept."""
    n = HEIGHT * WIDTH
    features = VisionFeatures(projected=torch.zeros(n, 2), grid=(1, HEIGHT, WIDTH))
    groups = [Group(features, torch.arange(n) + frame * n) for frame in range(FRAMES)]
    kept = [frame * n + cell for frame, keep in enumerate(KEEP) for cell in sorted(keep)]
    return EncodedImage(torch.zeros(FRAMES * n, 2), groups, torch.empty(0, dtype=torch.int64)), torch.tensor(kept)


def test_each_run_keeps_its_place_and_its_cells(engine: FamilyEngine) -> None:
    prompt, (feature,) = processed(engine, video(engine))
    truth, delta = engine.model.get_mrope_input_positions(prompt, [feature])
    tokens, shorter, columns = pruned(prompt, feature)
    first, shorter_delta = engine.model.get_mrope_input_positions(tokens, [shorter])
    is_text = torch.ones(len(tokens), dtype=torch.bool)
    for start, last in shorter.mm_position.extract_embeds_range():
        is_text[start : last + 1] = False
    assert torch.equal(first[:, is_text], truth[:, columns][:, is_text])
    assert torch.equal(first[0], truth[0, columns])
    assert len(tokens) + shorter_delta == len(prompt) + delta

    image, kept = encoded()
    rows = engine.model.mark_kept(torch.zeros(len(kept), engine.model.row_width()), image, kept)
    bare, positions, _ = engine.model.recompute_mrope_positions(tokens, [rows], first, 0)
    assert torch.equal(positions, truth[:, columns])
    assert bare[0].shape[1] == engine.model.row_width()
