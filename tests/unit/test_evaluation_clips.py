"""``promprune eval --clips``: what is kept of events, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from promprune_vllm.bench import clips as measuring
from promprune_vllm.bench.clips import SIDE, TOKENS, judge, kept_tokens, pooled
from promprune_vllm.cli import app
from promprune_vllm.core.features import VisionFeatures
from promprune_vllm.core.registry import get_method, methods
from promprune_vllm.demo.scenes.clips import FRAMES, make_clip
from promprune_vllm.evaluation import clips as telling


def test_an_event_is_kept_if_enough_of_it_is_in_one_of_its_frames() -> None:
    masks = [{1: np.array([[1, 1, 0]], bool), 2: np.array([[1, 1, 1]], bool)}, {3: np.array([[0, 0, 1]], bool)}]
    kept = torch.zeros(4, 1, 3, dtype=torch.bool)
    kept[0, 0, 0] = kept[2, 0, 2] = True
    assert judge(kept, masks) == (0, 0, 0.5, 0.5)  # nothing of the second event
    kept[3, 0, 2] = True
    assert judge(kept, masks)[:2] == (1, 0)  # a third of the first
    kept[1, 0, 1] = True
    assert judge(kept, masks)[:2] == (1, 1)
    assert judge(kept, masks)[2:] == (0.25, 0.25)


def test_tokens_of_an_event_are_those_with_a_patch_of_it() -> None:
    clip = make_clip("count", 4)
    for whole, half in zip(clip.masks(), pooled(clip), strict=True):
        for frame, mask in whole.items():
            assert {(y // 2, x // 2) for y, x in zip(*mask.nonzero(), strict=True)} == set(
                zip(*half[frame].nonzero(), strict=True)
            )


@pytest.mark.parametrize("name", [*telling.METHODS.split(",")])
def test_every_method_of_the_comparison_keeps_its_budget_of_a_clip(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TOKENS, 24, generator=generator)
    features = VisionFeatures(rows, (FRAMES, SIDE, SIDE), saliency=torch.rand(TOKENS), encoder=rows)
    kept = kept_tokens(features, TOKENS // 32, get_method(name))
    assert kept.shape == (FRAMES, SIDE, SIDE)
    assert kept.sum() == TOKENS // 32
    assert {*methods(over_frames=True), "promprune", "prunesid"} <= {*telling.METHODS.split(",")}


def test_two_clips_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measuring, "CLIP_KINDS", ("digit", "pan"))
    arguments = ["eval", "--clips", "1", "--methods", "evs,promprune-video", "--budgets", "100,12.5%"]
    run = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert "promprune-video" in run.output
    document = json.loads((tmp_path / "clips.json").read_text())
    assert {(row["method"], row["kept"], row["kind"]) for row in document["rows"]} == {
        (method, kept, kind)
        for method in ("evs", "promprune-video")
        for kept in (100, 288)
        for kind in ("digit", "pan")
    }
    assert telling.estimate(document, "evs", "first", ("digit", "pan"), 100)[0] == 1
    assert telling.estimate(document, "promprune-video", "some", ("digit", "pan"), 288)[0] == 1
    text = (tmp_path / "clips.md").read_text()
    assert "| `evs` |" in text
    assert "4.34% (100)" in text
    assert "**No model answered anything**" in text
    assert (tmp_path / "clips.png").stat().st_size > 10_000


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for options, complaint in ((["--methods", "nope"], "no method 'nope'"), (["--budgets", "0"], "--budgets")):
        run = CliRunner().invoke(app, ["eval", "--clips", "1", "--no-plots", "--out", str(tmp_path), *options])
        assert run.exit_code != 0
        assert complaint in run.output
