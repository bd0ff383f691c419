"""What ``promprune calibrate`` makes of measured entropies, and what it refuses before it starts an engine."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from promprune_vllm import cli, get_method
from promprune_vllm.commands.calibration_table import option, show
from promprune_vllm.config import Settings
from promprune_vllm.core.calibration import (
    SHARES,
    CalibrationReport,
    MeasuredImage,
    SkippedImage,
    histogram,
    quantile,
)
from promprune_vllm.demo import photo_path
from promprune_vllm.engine import families
from promprune_vllm.engine.api_server import borrowed_mu
from promprune_vllm.engine.worker.calibration_run import _stdout_to_stderr, image_files
from promprune_vllm.errors import SettingsError

OPTIONS = {"mu": 0.42, "tau": 0.02, "entropy": "spectral"}
VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def report(*entropies: tuple[float, ...], **more: Any) -> CalibrationReport:
    images = [MeasuredImage(f"{i}.jpg", 100 + i, values) for i, values in enumerate(entropies)]
    return CalibrationReport("model", images, (), OPTIONS, **more)


def shown(measured: CalibrationReport) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        show(measured, console)
    return capture.get()


@given(VALUES, st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    assert quantile(sorted(values), share) == pytest.approx(np.quantile(values, share), abs=1e-12)


@given(VALUES, st.integers(1, 20))
def test_a_histogram_counts_every_value_once(values: list[float], bins: int) -> None:
    counted = histogram(values, bins)
    assert sum(count for _, count in counted) == len(values)
    edges = [edge for edge, _ in counted]
    assert edges == sorted(edges)
    assert edges[0] == min(values)
    assert counted[0][1] > 0


def test_mu_is_the_median_over_groups_and_not_over_images() -> None:
    measured = report((0.1,), (0.5, 0.6, 0.7), (0.2,))
    assert measured.mu == 0.5
    document = measured.as_document()
    assert document["groups"] == 5
    assert document["tokens"] == {"min": 100, "median": 101, "max": 102}
    assert document["entropy"] == {
        name: pytest.approx(np.quantile([0.1, 0.2, 0.5, 0.6, 0.7], share)) for name, share in SHARES.items()
    }
    assert document["images"][1] == {"file": "1.jpg", "tokens": 101, "entropies": [0.5, 0.6, 0.7]}
    assert "5 tiles" in shown(measured)
    assert "tiles" not in shown(report((0.1,), (0.2,)))


def test_of_several_kinds_mu_is_the_midpoint_whatever_their_numbers() -> None:
    many = [MeasuredImage(f"{i}", 100, (0.2 + 0.001 * i,), "lone") for i in range(21)]
    few = [MeasuredImage(f"{i}", 100, (0.4,), "crowded") for i in range(3)]
    measured = CalibrationReport("model", [*few, *many], (), OPTIONS)
    assert measured.medians == {"lone": 0.21, "crowded": 0.4}
    assert measured.mu == 0.305
    assert measured.median == pytest.approx(0.2115)
    document = measured.as_document()
    assert (document["mu"], document["median"]) == (measured.mu, measured.median)
    assert document["images"][0]["folder"] == "crowded"
    assert "the midpoint between the medians of the folders (lone 0.2100, crowded 0.4000)" in shown(measured)


def test_the_saturated_zone_begins_at_three_tau() -> None:
    measured = report((0.43,), (0.48,), (0.5,), (0.55,), (0.57,))
    assert measured.saturated(0.5) == 2 / 5  # 0.43 and 0.57
    assert measured.as_document()["saturated_share"] == {"mu": 2 / 5, "mu_in_force": 3 / 5}
    assert "that is 40% with this mu, 60% with the mu in force, 0.42." in shown(measured)


def test_the_suggestion_can_be_pasted_and_keeps_the_operators_options() -> None:
    measured = report((0.53123,), chosen={"coverage": "fps", "mu": 0.3})
    name, value = shlex.split(option(measured))
    assert name == "--visual-token-method-options"
    assert json.loads(value) == {"coverage": "fps", "mu": 0.5312}
    assert option(measured) in shown(measured)
    assert option(report((0.5312,))) == "--visual-token-method-options '{\"mu\": 0.5312}'"


def test_the_document_is_json_and_names_what_was_skipped() -> None:
    measured = CalibrationReport("m", [MeasuredImage("a", 4, (1.0,))], [SkippedImage("b", "broken")], OPTIONS)
    document = json.loads(json.dumps(measured.as_document()))
    assert document["skipped"] == [{"file": "b", "reason": "broken"}]
    assert document["options_in_force"] == OPTIONS


def test_image_files_are_told_by_their_names_and_a_limit_spreads_over_them(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    for name in ("notes.txt", "README", "b.JPG", "a.png", *(f"c{i}.webp" for i in range(8))):
        (tmp_path / name).touch()
    names = [path.name for path in image_files(tmp_path)]
    assert names == ["a.png", "b.JPG", *(f"c{i}.webp" for i in range(8))]
    for limit in range(1, 13):
        chosen = [path.name for path in image_files(tmp_path, limit)]
        assert chosen == sorted(set(chosen))
        assert len(chosen) == min(limit, 10)
    assert [path.name for path in image_files(tmp_path, 2)] == ["a.png", "c3.webp"]


def test_what_libraries_write_does_not_reach_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(1, b"before ")
    with _stdout_to_stderr():
        os.write(1, b"a library")
    os.write(1, b"after")
    assert tuple(capfd.readouterr()) == ("before after", "a library")


@pytest.mark.parametrize(
    ("directory", "method", "complaint"),
    [
        ("nowhere", "promprune", "There is no directory"),
        ("empty", "promprune", "has the extension of an image"),
        ("empty", "random", "Only method 'promprune' has a mu to calibrate"),
        ("empty", "nothing", "There is no method 'nothing'"),
    ],
)
def test_what_cannot_be_calibrated_ends_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str, method: str, complaint: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PROMPRUNE_METHOD", method)
    result = CliRunner().invoke(cli.app, ["calibrate", "MODEL", "--images", str(tmp_path / directory)])
    assert result.exit_code == 2
    assert complaint in result.output


def test_an_option_in_the_models_place_is_named() -> None:
    photos = str(photo_path("coffee").parent)
    result = CliRunner().invoke(cli.app, ["calibrate", "--dtype", "float32", "MODEL", "--images", photos])
    assert result.exit_code == 2
    assert "MODEL must come before vLLM's options, got --dtype first" in result.output


def model_config(architecture: str = "Qwen2_5_VLForConditionalGeneration", **own: Any) -> Any:
    """What is looked at of vLLM's ``ModelConfig``."""
    return SimpleNamespace(model="some/model", architectures=[architecture], hf_config=SimpleNamespace(**own))


def test_a_checkpoint_carries_its_own_calibration() -> None:
    family = families.calibration(model_config())
    assert family["promprune"]["mu"] == 0.5744
    own = families.calibration(model_config(promprune_calibration={"promprune": {"mu": 0.3, "tau": 0.05}}))
    assert Settings().selector(own) == get_method("promprune", mu=0.3, tau=0.05)
    operators = Settings(method_options={"mu": 0.7})
    assert operators.selector(own) == get_method("promprune", mu=0.7, tau=0.05)  # the operator's own come first
    assert Settings().digest(own) != Settings().digest(family)
    only_tau = families.calibration(model_config(promprune_calibration={"promprune": {"tau": 0.05}}))
    assert Settings().selector(only_tau) == get_method("promprune", mu=0.5744, tau=0.05)


@pytest.mark.parametrize("carried", [0.3, {"mu": 0.3}, [], None])
def test_a_calibration_of_another_form_is_refused(carried: object) -> None:
    with pytest.raises(SettingsError, match=r"config\.json of some/model has promprune_calibration = "):
        families.calibration(model_config(promprune_calibration=carried))


BORROWERS = [name for name, family in families.FAMILIES.items() if not family.measured]
NEW = BORROWERS[0]


def test_towers_that_nobody_measured_are_known() -> None:
    assert {"Qwen2VLForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"} < set(BORROWERS)
    own = ("Llava", "LlavaNext", "Qwen2_5_VL")
    assert not {f"{name}ForConditionalGeneration" for name in own} & set(BORROWERS)


@pytest.mark.parametrize("architecture", BORROWERS)
def test_of_a_borrowed_mu_the_server_says_whose_it_is_and_how_to_measure_it(architecture: str) -> None:
    said = borrowed_mu.describe(model_config(architecture), Settings())
    assert said is not None
    family = families.FAMILIES[architecture]
    mu = Settings().selector(family.calibration).mu
    assert f"for some/model at mu = {mu} ({family.calibrated})" in said
    assert "`promprune calibrate some/model --images DIR`" in said
    assert "--visual-token-method-options" in said
    assert "\n" not in said


def test_where_another_method_is_configured_the_servers_options_would_not_set_mu() -> None:
    settings = Settings(method="divprune", allow_methods=("promprune",))
    said = borrowed_mu.describe(model_config(NEW), settings) or ""
    assert 'config.json: "promprune_calibration": {"promprune": {"mu": ...}}' in said
    assert "--visual-token-method-options" not in said


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (model_config(), Settings()),
        (model_config("LlamaForCausalLM"), Settings()),
        (model_config(NEW), Settings(method_options={"mu": 0.5744})),
        (model_config(NEW, promprune_calibration={"promprune": {"mu": 0.5744}}), Settings()),
        (model_config(NEW), Settings(method="split-50", allow_methods=("divprune",))),
        (model_config(NEW), Settings(method_options={"kr_min": 0.5, "kr_max": 0.5})),
    ],
    ids=("measured", "no family", "option", "checkpoint", "not allowed", "fixed split"),
)
def test_of_a_mu_that_is_measured_set_or_never_used_nothing_is_said(config: Any, settings: Settings) -> None:
    assert borrowed_mu.describe(config, settings) is None


@pytest.mark.parametrize("settings", [Settings(method_options={"tau": 0.05}), Settings(allow_methods=("random",))])
def test_other_options_do_not_set_mu(settings: Settings) -> None:
    carried = model_config(NEW, promprune_calibration={"promprune": {"tau": 0.05}})
    assert borrowed_mu.describe(carried, settings) is not None
