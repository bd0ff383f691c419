"""``promprune calibrate`` with real vLLM: what it measures is the entropy of what the model captures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from promprune_vllm import cli
from promprune_vllm.config import Settings
from promprune_vllm.demo import photo_path
from promprune_vllm.demo.model import DemoModelSpec, build_demo_model
from promprune_vllm.engine.worker import calibration_run
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from tests.engine import family_engine
from tests.engine.family_engine import FamilyEngine
from tests.engine.family_facts import KINDS, TILED, UNLOADABLE, VARIANTS, engine_options

pytestmark = pytest.mark.engine
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
DIRECTORY = photo_path("coffee").parent
OPTIONS = ("--block-size", "32")
# What does not depend on the family is tested with these: the first has one group per image, the second has tiles.
TWO = pytest.mark.parametrize("engine", ["qwen2_5_vl", "llava_next"], indirect=True)


class Attached(FamilyEngine):
    """Looks inside the engine that ``promprune calibrate`` itself has started."""

    def __init__(self, family: str, llm: Any) -> None:
        self.family, self.llm = family, llm
        (self.model,) = llm.apply_model(lambda model: model)

    @torch.inference_mode()
    def encoded(self, shape: str) -> EncodedImage:
        image = super().encoded(shape)
        calibration_run._pop_measured(self.model)  # drop what the test itself encoded
        return image


@pytest.fixture(
    scope="module", params=[*KINDS, *(pytest.param(each, marks=pytest.mark.release) for each in VARIANTS)]
)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Attached]:
    family = request.param
    if family in UNLOADABLE:
        pytest.skip("this minor of vLLM cannot load the family on a CPU, with or without us")
    options = [*OPTIONS, *command_line(engine_options(family))]
    with calibration_run.load_model(str(models[family]), options) as llm:
        yield Attached(family, llm)


def command_line(options: dict[str, Any]) -> list[str]:
    """Options of vLLM's engine, as ``promprune calibrate`` takes them."""
    given = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    return [word for name, value in given for word in ((name,) if value is True else (name, str(value)))]


@pytest.fixture(autouse=True)
def _environment_and_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in calibration_run._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # put back for the servers of later tests
    monkeypatch.setattr(
        family_engine, "picture", lambda name: Image.open(photo_path(name)).convert("RGB"), raising=True
    )


def entropy(features: torch.Tensor) -> float:
    """Normalised spectral entropy, from its definition."""
    x = features.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
    p = values / values.sum()
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum() / math.log(min(x.shape)))


def command(engine: Attached, monkeypatch: pytest.MonkeyPatch, directory: Path, *arguments: str) -> Result:
    monkeypatch.setattr(calibration_run, "load_model", lambda *_: nullcontext(engine.llm))
    return CliRunner().invoke(cli.app, ["calibrate", "MODEL", "--images", str(directory), *arguments])


def test_the_document_holds_the_entropies_of_what_the_model_captures(
    engine: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every family."""
    result = command(engine, monkeypatch, DIRECTORY, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [image["file"] for image in document["images"]] == [f"{name}.jpg" for name in PHOTOS]
    everything: list[float] = []
    for image, name in zip(document["images"], PHOTOS, strict=True):
        encoded = engine.encoded(name)
        truth = [entropy(group.features.projected) for group in encoded.groups]
        assert image["tokens"] == len(encoded.rows)
        assert image["entropies"] == pytest.approx(truth, abs=1e-6)
        everything += truth
    assert document["groups"] == len(everything)
    assert document["mu"] == pytest.approx(np.median(everything), abs=6e-5)
    assert document["entropy"]["p25"] == pytest.approx(np.quantile(everything, 0.25), abs=1e-6)
    far = np.abs(np.array(everything) - document["mu"]) > 0.06
    assert document["saturated_share"]["mu"] == pytest.approx(far.mean())
    assert (document["groups"] > len(PHOTOS)) == engine.facts.tiled
    assert document["options_in_force"]["mu"] == engine.facts.mu


@TWO
def test_what_is_printed_is_the_document_in_words(engine: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPRUNE_METHOD_OPTIONS", '{"tau": 0.05}')
    document = json.loads(command(engine, monkeypatch, DIRECTORY, "--json", "--limit", "2").stdout)
    printed = command(engine, monkeypatch, DIRECTORY, "--limit", "2").stdout
    assert [image["file"] for image in document["images"]] == ["astronaut.jpg", "coffee.jpg"]
    assert "2 images" in printed
    assert f'--visual-token-method-options \'{{"tau": 0.05, "mu": {document["mu"]}}}\'' in printed
    assert f"{document['entropy']['median']:.4f}" in printed
    assert (f"{document['groups']} tiles" in printed) == engine.facts.tiled


@TWO
def test_equal_images_count_twice_and_what_cannot_be_measured_is_named(
    engine: Attached, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a broken.jpg").write_text("not an image")
    thin = Image.new("RGB", (1000, 3))
    thin.save(tmp_path / "b thin.png")
    for name in ("c.jpg", "d.jpg"):
        shutil.copy(photo_path("coffee"), tmp_path / name)
    result = command(engine, monkeypatch, tmp_path, "--json")
    document = json.loads(result.stdout)
    files = {image["file"]: image["entropies"] for image in document["images"]}
    skipped = {image["file"]: image["reason"] for image in document["skipped"]}
    assert files["c.jpg"] == files["d.jpg"]
    assert "cannot identify image file" in skipped["a broken.jpg"]
    assert "promprune: skipped a broken.jpg: " in result.stderr
    takes_any_shape = engine.facts.tiled  # Qwen's processor does not
    with nullcontext() if takes_any_shape else pytest.raises(ValueError, match="aspect ratio"):
        engine.inputs(thin)
    assert ("b thin.png" in files, "b thin.png" in skipped) == (takes_any_shape, not takes_any_shape)
    (tmp_path / "c.jpg").unlink()
    (tmp_path / "d.jpg").unlink()
    (tmp_path / "b thin.png").unlink()
    nothing = command(engine, monkeypatch, tmp_path)
    assert nothing.exit_code == 2
    assert "None of the 1 images" in nothing.output
    assert "cannot identify image file" in nothing.output


@pytest.mark.parametrize("engine", TILED, indirect=True)
def test_tiles_are_measured_as_the_server_prunes_them(engine: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = engine.encoded("coffee").groups
    with Image.open(photo_path("coffee")) as photo:
        boxes = engine.processor.boxes(*photo.size)
    # The tile with the whole image has the largest tokens; in some families it comes first, in others last.
    whole = max(groups, key=lambda group: boxes[group.positions[0]][2] - boxes[group.positions[0]][0])
    base = entropy(whole.features.projected)
    visual = torch.cat([group.features.projected for group in groups])
    for tiles, truth in (("base", base), ("merged", entropy(visual))):
        monkeypatch.setattr(engine.model, "_settings", Settings(tiles=tiles))
        measured = calibration_run.measure(engine.llm, photo_path("coffee"))
        assert measured.entropies == pytest.approx([truth], abs=1e-6)


def test_a_model_that_cannot_be_pruned_or_loaded_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Before an engine starts."""
    spec = DemoModelSpec(vision="siglip", image_px=56, hidden=64, heads=2, mlp=128, layers=2)
    siglip = build_demo_model(tmp_path / "siglip", spec)
    for model, complaint in ((siglip, "which has no CLS token"), (tmp_path / "nothing", "vLLM cannot load")):
        result = CliRunner().invoke(cli.app, ["calibrate", str(model), "--images", str(DIRECTORY), *OPTIONS])
        assert result.exit_code == 2
        assert complaint in result.output
        assert result.stdout == ""
