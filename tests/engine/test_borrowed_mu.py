"""vLLM's own start of a server, without an engine: who is told that nobody measured the model's mu."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from promprune_vllm.engine import plugin
from tests.checkpoints import CHECKPOINTS
from tests.engine.test_unprunable import asked

pytestmark = pytest.mark.engine
STATE = {"state": ("/v1/visual_tokens", None)}


@pytest.fixture
def variables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in request.param.items():
        monkeypatch.setenv(variable, value)


@pytest.mark.parametrize(
    ("name", "variables", "warnings"),
    [
        ("qwen2_vl", {}, 1),
        ("qwen2_vl", {"PROMPRUNE_METHOD": "divprune", "PROMPRUNE_ALLOW_METHODS": "promprune"}, 1),
        ("qwen2_vl", {"PROMPRUNE_METHOD_OPTIONS": '{"mu": 0.5}'}, 0),
        ("trained", {}, 0),
    ],
    indirect=["variables"],
)
@pytest.mark.usefixtures("variables")
def test_a_server_warns_once_of_a_borrowed_mu(
    name: str, warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.register()
    model = CHECKPOINTS[name](tmp_path / name)
    with caplog.at_level(logging.INFO, logger="vllm.promprune"):
        replies = asyncio.run(asked(model, STATE))
    assert replies["state"][1]["prunable"]
    said = [each for each in caplog.records if "promprune calibrate" in each.getMessage()]
    assert [(each.name, each.levelname) for each in said] == [("vllm.promprune", "WARNING")] * warnings
    assert all(f"for {model} at mu = 0.5744 (Qwen2.5-VL's" in each.getMessage() for each in said)
