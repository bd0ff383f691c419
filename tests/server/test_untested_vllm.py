"""A vLLM that this release was not tested with: what runs, what is named, what never breaks.

Each is a copy of the installed vLLM with another version and a line changed; which seams those are for every
function is in tests/unit/test_seams.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from promprune_vllm.demo.server import Server, one_worker, serving
from promprune_vllm.engine.compat import versions
from tests import runner
from tests.conftest import UNMEASURED, VISUAL_TOKENS
from tests.server.conftest import ENVIRONMENT, OPTIONS, ask, body, post, series
from tests.vllm_copy import copy_of_vllm

pytestmark = pytest.mark.server
MINOR = versions.installed_minor()
NEWEST = versions.minor_of(versions.TESTED[-1])
# Newer than all, where the newest is installed; a release of its own of the minor, where another one is.
OTHER = "0.{}.0".format(int(NEWEST.split(".")[1]) + 1) if MINOR == NEWEST else f"{MINOR}.99"
COMPARED = versions.reference(OTHER)
CORE = {"vllm.multimodal.hasher": ("return hasher.hexdigest()", "return str(hasher.hexdigest())")}
FAMILY = {
    "vllm.model_executor.models.llava": (
        "image_input = self._parse_and_validate_image_input(**kwargs)",
        "image_input = self._parse_and_validate_image_input(**{**kwargs})",
    )
}
SIDE = {
    "vllm.v1.engine.async_llm": (
        "mm_processor_cache = renderer.mm_processor_cache",
        "mm_processor_cache = renderer.mm_processor_cache or None",
    )
}
CALL = {"vllm.v1.request": ("events, self.events = self.events, []", "events, self.events = [*self.events], []")}
HASH = "vllm.multimodal.hasher:MultiModalHasher.hash_kwargs (code changed)"
EMBED = "vllm.model_executor.models.llava:LlavaForConditionalGeneration.embed_multimodal (code changed)"
HANDLER = "vllm.v1.engine.async_llm:AsyncLLM._run_output_handler (code changed)"


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, **UNMEASURED, "PYTHONPATH": runner.python_path(folder), **more}


def run(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, *words)
    return subprocess.run(
        command, env=environment(folder, **more), capture_output=True, text=True, timeout=300, check=False
    )


# Each kind of change

WHAT_RUNS = """
import json, os, time
from vllm import ModelRegistry
from promprune_vllm.engine.compat import fingerprints, verdict
from vllm.plugins import load_general_plugins
find, asked = fingerprints.find, []
fingerprints.find = lambda *words: (asked.append(words), find(*words))[1]
begun = time.process_time()
found = verdict.current()
spent = time.process_time() - begun
load_general_plugins()
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.renderers.base import BaseRenderer
print(json.dumps({
    "moved": found.moved, "compared": len(asked), "seconds": spent, "tested": found.tested,
    "variable": os.environ.get("PROMPRUNE_VLLM_VERDICT"),
    "llava": ModelRegistry.models["LlavaForConditionalGeneration"].module_name,
    "qwen": ModelRegistry.models["Qwen2VLForConditionalGeneration"].module_name,
    "generate": getattr(AsyncLLM.generate, "__promprune_patches__", ()),
    "renderer": getattr(BaseRenderer.__init__, "__promprune_patches__", ()),
}))
"""
OURS = "promprune_vllm.engine.families"
STOCK = "vllm.model_executor.models"
RESEND, RECORD = "vllm_fixes.resending:resend_on_cache_miss", "api_server.rendered_features:record_prompt"
AGAIN, WAIT = "api_server.escalation:ask_again_if_unsure", "api_server.first_tokens:observe_first_tokens"


@dataclass(frozen=True)
class Effect:
    """Which parts are off, whose model classes serve LLaVA and Qwen2-VL, and what wraps ``AsyncLLM.generate``."""

    moved: dict[str, list[str]]
    llava: str
    qwen: str
    generate: list[str]


EFFECTS = {
    "nothing": ({}, Effect({}, OURS, OURS, [RESEND, RECORD, AGAIN, WAIT])),
    "call": (CALL, Effect({}, OURS, OURS, [RESEND, RECORD, AGAIN, WAIT])),
    "side": (SIDE, Effect({"resending": [HANDLER]}, OURS, OURS, [RECORD, AGAIN, WAIT])),
    "family": (FAMILY, Effect({"LLaVA": [EMBED]}, STOCK, OURS, [RESEND, RECORD, AGAIN, WAIT])),
    "core": (CORE, Effect({"processor": [HASH]}, STOCK, STOCK, [])),
}


@pytest.mark.parametrize("kind", EFFECTS)
def test_each_kind_of_change_has_its_own_effect(kind: str, tmp_path: Path) -> None:
    edits, effect = EFFECTS[kind]
    done = run(copy_of_vllm(tmp_path / "copy", OTHER, edits), "-c", WHAT_RUNS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["moved"] == effect.moved
    assert found["llava"].startswith(effect.llava)
    assert found["qwen"].startswith(effect.qwen)
    assert found["generate"] == effect.generate
    assert bool(found["renderer"]) == (effect.qwen == OURS)
    assert found["compared"] > 150
    assert not found["tested"]
    (warning,) = [line for line in (done.stdout + done.stderr).splitlines() if "promprune-vllm" in line]
    assert f"vLLM {OTHER}" in warning
    assert f"as in {COMPARED}" in warning


def test_a_child_process_is_told(tmp_path: Path) -> None:
    folder = copy_of_vllm(tmp_path / "copy", OTHER, SIDE)
    first = json.loads(run(folder, "-c", WHAT_RUNS).stdout.splitlines()[-1])
    print(f"compared {first['compared']} seams in {first['seconds']:.2f} s of one core")
    told = run(folder, "-c", WHAT_RUNS, PROMPRUNE_VLLM_VERDICT=first["variable"])
    second = json.loads(told.stdout.splitlines()[-1])
    assert second["compared"] == 0
    assert (second["moved"], second["generate"]) == (first["moved"], first["generate"])
    assert "was not tested" not in told.stdout + told.stderr


def test_a_tested_version_is_not_compared(tmp_path: Path) -> None:
    """Even if it was changed: what makes a version known is its number."""
    done = run(copy_of_vllm(tmp_path / "copy", f"{versions.reference(MINOR)}+build7", CORE), "-c", WHAT_RUNS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["compared"], found["tested"], found["moved"]) == (0, True, {})
    assert found["llava"].startswith(OURS)
    assert "was not tested" not in done.stdout + done.stderr


def test_the_operator_may_ignore_changed_code(tmp_path: Path) -> None:
    done = run(copy_of_vllm(tmp_path / "copy", OTHER, CORE), "-c", WHAT_RUNS, PROMPRUNE_UNTESTED_VLLM="1")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["moved"] == {}
    assert found["llava"].startswith(OURS)
    assert "PROMPRUNE_UNTESTED_VLLM=1 ignores changes of" in done.stdout + done.stderr


# vLLM's commands


DEMANDING, WRONG = {"PROMPRUNE_BUDGET": "64"}, {"PROMPRUNE_METHOD": "nonsense"}


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        (("--version",), DEMANDING),
        (("--version",), WRONG),
        (("--help",), DEMANDING),
        (("bench", "serve", "--help"), DEMANDING),
    ],
    ids=["version, budget", "version, wrong setting", "help", "bench"],
)
def test_no_command_of_vllm_breaks(command: tuple[str, ...], setting: dict[str, str], tmp_path: Path) -> None:
    folder = copy_of_vllm(tmp_path / "copy", OTHER, CORE)
    done = run(folder, "-m", "promprune_vllm", "vllm", *command, **setting)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("start", ["promprune serve", "vLLM itself"])
def test_a_server_that_is_to_prune_every_image_and_cannot_does_not_start(
    start: str, demo_model: Path, tmp_path: Path
) -> None:
    itself = "import sys; from vllm import LLM; LLM(sys.argv[2])"
    words = ("-m", "promprune_vllm") if start == "promprune serve" else ("-c", itself)
    folder = copy_of_vllm(tmp_path / "copy", OTHER, CORE)
    done = run(folder, *words, "serve", str(demo_model), PROMPRUNE_BUDGET="64")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "The settings prune images of requests without a budget" in last
    for word in (OTHER, HASH, "PROMPRUNE_UNTESTED_VLLM=1", "PROMPRUNE_ENABLED=false"):
        assert word in last


# Over HTTP


def served(demo_model: Path, folder: Path, edits: Mapping[str, tuple[str, str]]) -> Iterator[Server]:
    copied = copy_of_vllm(folder / "copy", OTHER, edits)
    words, variables = one_worker(OPTIONS, ENVIRONMENT)
    variables = {**variables, "PYTHONPATH": runner.python_path(copied)}
    with serving(demo_model, *words, log=folder / "log", environment=variables) as running:
        yield running


@pytest.fixture(scope="module")
def newer(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One feature's code has changed."""
    yield from served(demo_model, tmp_path_factory.mktemp("newer"), SIDE)


@pytest.fixture(scope="module")
def other_family(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from served(demo_model, tmp_path_factory.mktemp("family"), FAMILY)


@pytest.fixture(scope="module")
def changed_core(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from served(demo_model, tmp_path_factory.mktemp("core"), CORE)


def warnings(server: Server) -> list[str]:
    lines = server.log.read_text().splitlines()
    return [line for line in lines if f"vLLM {OTHER} " in line and "functions and classes" in line]


def test_a_newer_version_prunes_with_one_warning(newer: Server) -> None:
    answer = ask(newer, "coffee", visual_token_budget=9)
    assert answer["usage"]["visual_tokens"]["kept"] == 9
    (warning,) = warnings(newer)
    assert "Off: resending (an image whose first request was refused gets HTTP 500, as in vLLM alone)" in warning


def test_what_is_off_is_in_the_api_and_the_metrics(newer: Server) -> None:
    state = httpx.get(f"{newer.url}/v1/visual_tokens").json()
    assert state["vllm_version"] == OTHER
    assert state["vllm_check"]["tested"] is False
    assert state["vllm_check"]["compared_with"] == COMPARED
    (off,) = state["vllm_check"]["off"]
    assert (off["part"], off["changed"]) == ("resending", [HANDLER])
    shown = series(newer)
    off_parts = {key[1] for key, value in shown.items() if key[0] == "promprune_part_off" and value}
    assert off_parts == {"resending"}
    assert any(key[0] == "promprune_build_info" and {OTHER, "false"} <= set(key) for key in shown)


def test_a_family_whose_code_has_changed_is_vllms_own(other_family: Server) -> None:
    answer = ask(other_family, "coffee")
    assert answer["usage"]["visual_tokens"]["kept"] == VISUAL_TOKENS
    refused = post(other_family, "/v1/chat/completions", body("coffee", visual_token_budget=9))
    assert refused.status_code == 400
    error = refused.json()["error"]["message"]
    assert EMBED in error
    assert OTHER in error
    (warning,) = warnings(other_family)
    assert "budgets for LlavaForConditionalGeneration get HTTP 400" in warning
    state = httpx.get(f"{other_family.url}/v1/visual_tokens").json()
    assert state["prunable"] is False
    assert EMBED in state["reason"]


def test_with_changed_core_code_vllm_serves_as_stock(changed_core: Server) -> None:
    for fields in ({}, {"visual_token_budget": 9}):
        answer = ask(changed_core, "coffee", **fields)
        assert answer["usage"]["prompt_tokens"] > VISUAL_TOKENS
        assert "visual_tokens" not in answer["usage"]
    assert httpx.get(f"{changed_core.url}/v1/visual_tokens").status_code == 404
    assert not changed_core.families("promprune")
    (warning,) = warnings(changed_core)
    assert "PromPrune is off, vLLM runs as if it were not installed" in warning
    assert HASH in warning
