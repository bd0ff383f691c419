"""What cannot be pruned or honoured is said at start-up, and never a silent no-op.

Models without a family are in tests/engine/test_unprunable.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from promprune_vllm.demo.server import Server
from tests.server.conftest import post
from tests.server.test_budget import _routes

pytestmark = pytest.mark.server


def _announcements(server: Server) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if "PromPrune" in line]


def test_a_model_that_can_be_pruned_says_so(server: Server) -> None:
    (line,) = _announcements(server)
    assert "prunes the images" in line
    assert "method promprune" in line


_WHAT_IS_LOADED = """
import logging, sys, vllm
logging.basicConfig(level='INFO')
vllm.__version__ = '0.99.1'
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
load_general_plugins()
print(ModelRegistry.models['LlavaForConditionalGeneration'].module_name)
print(*sorted(name for name in sys.modules if name.startswith('promprune_vllm.engine')))
"""


def test_switched_off_nothing_of_the_plugin_is_loaded_whatever_vllm_and_the_settings_are() -> None:
    """Without VLLM_PLUGINS, so that other plugins are loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    result = subprocess.run(
        [sys.executable, "-c", _WHAT_IS_LOADED],
        env={**environment, "PROMPRUNE_ENABLED": "false", "PROMPRUNE_METHOD": "nonsense"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    served, loaded = result.stdout.strip().splitlines()[-2:]
    assert served == "vllm.model_executor.models.llava"
    assert loaded.split() == ["promprune_vllm.engine", "promprune_vllm.engine.plugin"]
    assert "PromPrune is off (PROMPRUNE_ENABLED=false)" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--visual-token-method", "promprun"), "There is no method 'promprun'. Did you mean 'promprune'?"),
        (
            ("--visual-token-min", "9", "--visual-token-max", "3"),
            "must satisfy 1 <= minimum <= maximum, got 9 and 3",
        ),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_at_start_up(
    demo_model: Path, options: tuple[str, ...], complaint: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "promprune_vllm", "serve", str(demo_model), *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2
    assert complaint in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("path", _routes())
@pytest.mark.parametrize("key", ["visual_token_budget", "visual_token_detail", "_promprune_profile"])
def test_our_keys_are_no_processor_options(server: Server, path: str, key: str) -> None:
    """Whether or not vLLM has a gate against those."""
    response = post(server, path, {**_routes()[path], "mm_processor_kwargs": {key: 9}})
    if response.status_code == 200:
        assert path in {"/v1/messages", "/v1/responses"}, "these routes have no such field"
    else:
        assert response.status_code == 400
        assert "mm_processor_kwargs" in response.json()["error"]["message"]
