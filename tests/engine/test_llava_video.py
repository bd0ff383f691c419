"""LLaVA-OneVision and LLaVA-NeXT-Video: what is captured of frames that vLLM shrinks, and newlines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from promprune_vllm import get_method
from promprune_vllm.demo import photo_path
from promprune_vllm.engine.worker import calibration_run
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.selected_tokens import select_tokens
from tests.clips import Clip
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine, shared_engine
from tests.engine.family_prompts import LLAVA_VIDEO, photo
from tests.engine.test_saliency import TOLERANCES
from tests.engine.test_videos import encoded
from tests.engine.videos import rendered

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
CLIP = Clip(3, "portrait")


class Photograph(Clip):
    """A photograph as a video of one frame."""

    @property
    def item(self) -> Any:
        return np.array(photo("coffee"))[None]


@pytest.fixture(params=LLAVA_VIDEO)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> FamilyEngine:
    return shared_engine(request.param, models[request.param])


def attention(engine: FamilyEngine, directory: Path) -> tuple[Tensor, Tensor]:
    """``(T, n)`` saliency of the clip's frames by transformers, of the right layer and of the one before."""
    from transformers import AutoModelForImageTextToText

    engine.forget()  # an item that is cached has no pixels
    (item,) = rendered(engine, engine.ask(CLIP))["mm_kwargs"]["video"]
    model = AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager").model
    onevision = hasattr(model, "apply_pooling")
    with torch.inference_mode():
        maps = model.vision_tower(item["pixel_values_videos"].data, output_attentions=True).attentions
        last = model.config.vision_feature_layer
        shrink = model.apply_pooling if onevision else model.vision_resampler
        found = []
        for layer in (last, last - 1):
            patches = maps[layer].mean(dim=(1, 2)) if onevision else maps[layer][:, :, 0, 1:].mean(dim=1)  # (T, P)
            found.append(shrink(patches[..., None])[..., 0])
    return found[0], found[1]


def test_a_frames_saliency_is_that_of_transformers_shrunk_as_its_rows_are(
    engine: FamilyEngine, models: dict[str, Path]
) -> None:
    video = encoded(engine, CLIP)
    assert len(video.groups) == CLIP.frames
    of_largest, of_own = TOLERANCES[engine.llm.model_config.dtype]
    for group, truth, other in zip(video.groups, *attention(engine, models[engine.family]), strict=True):
        saliency = group.features.saliency
        assert saliency is not None
        assert float((saliency - truth).abs().max() / truth.max()) < of_largest
        assert float(((saliency - other) / truth).abs().max()) > 10 * of_own, "the wrong layer would pass as well"


@torch.inference_mode()
def test_rows_before_the_projector_project_to_the_tokens(engine: FamilyEngine) -> None:
    """Exactly, but for what LLaVA-OneVision shrinks behind it: frames, and crops of many patches."""
    features = [group.features for group in encoded(engine, CLIP).groups]
    shrunk_behind = "image" in engine.modalities
    for each in features:
        projected = engine.model.project(each.encoder)
        assert torch.nn.functional.cosine_similarity(projected, each.projected).min() > 0.8
        if not shrunk_behind:
            torch.testing.assert_close(projected, each.projected, rtol=1e-4, atol=1e-5)
    if shrunk_behind:
        for group in engine.encoded("landscape").groups:
            projected = engine.model.project(group.features.encoder)
            torch.testing.assert_close(projected, group.features.projected, rtol=1e-4, atol=1e-5)


def test_the_row_behind_a_videos_frames_goes_first(engine: FamilyEngine) -> None:
    video = encoded(engine, CLIP)
    total, visual = len(video.rows), sum(group.features.tokens for group in video.groups)
    assert total - visual == len(video.newlines) == ("image" in engine.modalities)
    for keep in (1, visual - 1, visual, total):
        kept, places = _kept(engine, video, keep)
        assert len(places) == keep
        assert torch.equal(kept, video.rows[places])
        assert (int(places[-1]) >= visual) == (keep > visual)


def test_an_image_is_measured_as_a_video_of_one_frame_where_there_are_no_images(
    engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "image" in engine.modalities:
        pytest.skip("the family takes images")
    monkeypatch.setattr(engine.model, "capture", engine.model.capture)
    calibration_run._record_entropies(engine.model)
    measured = calibration_run.measure(engine.llm, photo_path("coffee"))
    assert isinstance(measured, calibration_run.MeasuredImage), measured
    video = encoded(engine, Photograph(1))
    assert measured.tokens == len(video.rows)
    assert measured.entropies == (float(get_method("promprune").entropy_of(video.groups[0].features)),)


@pytest.mark.parametrize("shape", ["landscape", "square"])
def test_shrunk_crops_are_grouped_by_tile_or_all_together(
    engine: FamilyEngine, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "image" not in engine.modalities:
        pytest.skip("the family takes no images")
    settings = engine.model._settings
    apart = engine.encoded(shape)
    visual = torch.cat([apart.newlines, *(group.positions for group in apart.groups)])
    assert torch.equal(visual.sort().values, torch.arange(len(apart.rows)))
    monkeypatch.setattr(engine.model, "_settings", settings.model_copy(update={"tiles": "merged"}))
    (together,) = engine.encoded(shape).groups
    whole = len(apart.groups[0].positions)
    for name in ("projected", "saliency", "encoder", "keys"):
        values = getattr(together.features, name)
        parts = torch.cat([getattr(group.features, name) for group in apart.groups])
        order = torch.cat([group.positions for group in apart.groups]).argsort()
        assert torch.equal(values, parts[order])
        assert torch.equal(values[:whole], getattr(apart.groups[0].features, name))
    monkeypatch.setattr(engine.model, "_settings", settings.model_copy(update={"tiles": "base"}))
    entropies = {float(group.features.entropy) for group in engine.encoded(shape).groups}
    assert entropies == {float(engine.model._methods[0].entropy_of(apart.groups[0].features))}


@torch.inference_mode()
def _kept(engine: FamilyEngine, video: EncodedImage, keep: int) -> tuple[Tensor, Tensor]:
    return select_tokens(video, keep, get_method("promprune")).rows(engine.model.project)


@pytest.mark.parametrize("mode", ["average", "max"])
def test_a_frames_values_are_shrunk_as_the_configuration_says(mode: str) -> None:
    from vllm.model_executor.models.llava_next_video import LlavaNextVideoPooler

    from promprune_vllm.engine.families.llava_next_video import PrunedLlavaNextVideo

    vision = SimpleNamespace(image_size=16, patch_size=4)
    pooler = LlavaNextVideoPooler(
        SimpleNamespace(spatial_pool_mode=mode, spatial_pool_stride=2, vision_config=vision)
    )
    model: Any = SimpleNamespace(vision_resampler=pooler)
    patches = torch.rand(4, 4)
    squares = patches.view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    expected = squares.mean(dim=1) if mode == "average" else squares.amax(dim=1)
    torch.testing.assert_close(PrunedLlavaNextVideo.of_tokens(model, patches.flatten(), 4), expected)
    keys = patches.flatten()[:, None].expand(-1, 3)
    torch.testing.assert_close(PrunedLlavaNextVideo.of_tokens(model, keys, 4), expected[:, None].expand(-1, 3))
