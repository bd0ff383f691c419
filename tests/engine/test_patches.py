"""The list of patches: complete, true to this vLLM, applied where it says."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from promprune_vllm.demo.families import build_family_model
from promprune_vllm.engine import patches, plugin
from promprune_vllm.engine.compat import parts
from promprune_vllm.engine.compat.patching import Patch, Reason, Stage
from promprune_vllm.engine.compat.seam import Seam, Use
from promprune_vllm.engine.keys import PATCHED_BY
from promprune_vllm.engine.patches import PATCHES
from promprune_vllm.errors import IncompatibleVllmError
from tests import runner
from tests.conftest import UNMEASURED
from tests.documents import ROOT
from tests.patched import WORKER, targets

pytestmark = pytest.mark.engine
SPEAKS = Reason(parts.REQUESTS, "a feature", "a cause", "a change")


def row(target: str, takes: tuple[str, ...] = (), use: Use = "wrap", loaded: bool = False, **more: Any) -> Patch:
    wrapper = "vllm_fixes.preemption:keep_mm_data"
    return Patch(target, wrapper, Seam(target, use, takes, **more), Stage.PLUGIN, SPEAKS, loaded)


def test_every_row_names_a_wrapper_of_its_own_and_says_why() -> None:
    assert len({(each.target, each.wrapper) for each in PATCHES}) == len(PATCHES)
    for each in PATCHES:
        module, _, function = each.wrapper.partition(":")
        wrapper = getattr(importlib.import_module(f"promprune_vllm.engine.{module}"), function)
        assert callable(wrapper), each.wrapper
        assert all((each.reason.feature, each.reason.why, each.reason.until)), each.target


def test_no_row_is_missing() -> None:
    """A wrapper that no row names, or a row that the documentation still has."""
    rows = (
        (ROOT / "docs" / "how-it-works.md").read_text().partition("<!-- patches -->")[2].partition("<!-- /patches")
    )
    documented = sorted(
        row.rpartition("`")[0].rpartition("`")[2] for row in rows[0].splitlines() if "` of `" in row
    )
    assert documented == sorted(each.wrapper.replace(":", ".") for each in PATCHES)
    engine = ROOT / "promprune_vllm" / "engine"
    wrappers = set()
    for path in engine.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            first = node.args.args[:1] if isinstance(node, ast.FunctionDef) else []
            if first and first[0].arg in ("original", "_") and len(node.args.args) == 1:
                module = ".".join(path.relative_to(engine).with_suffix("").parts)
                wrappers.add(f"{module}:{node.name}")
    assert len(wrappers) > 20
    assert wrappers <= {each.wrapper for each in PATCHES}


def test_every_target_is_as_its_row_says() -> None:
    applying = [each for each in PATCHES if each.applies]
    assert len(applying) > 40
    for each in applying:
        each.require()


@pytest.mark.parametrize(
    ("patch", "complaint"),
    [
        (row("vllm.no_such_module:X"), "which this vLLM lacks"),
        (row("vllm.renderers.base:BaseRenderer.no_such_method"), "which this vLLM lacks"),
        (row("vllm.renderers.base:BaseRenderer._apply_prompt_extras", ("extras",)), "taking extras"),
        (row("vllm.renderers.base:BaseRenderer._apply_prompt_extras", use="add"), "has one of its own"),
    ],
)
def test_a_changed_target_is_refused_and_then_nothing_is_patched(
    monkeypatch: pytest.MonkeyPatch, patch: Patch, complaint: str
) -> None:
    from vllm.v1.core.sched.output import NewRequestData

    good = row("vllm.v1.core.sched.output:NewRequestData.anon_repr")
    monkeypatch.setattr(patches, "PATCHES", (good, patch))
    with pytest.raises(IncompatibleVllmError, match=complaint):
        patches.install(Stage.PLUGIN)
    assert not hasattr(NewRequestData.anon_repr, PATCHED_BY)


def test_a_row_is_of_the_minors_that_have_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    for version, applies in (("0.29.0", False), ("0.30.2", True), ("0.31.0", False)):
        monkeypatch.setattr(vllm, "__version__", version)
        assert row("json:loads", since="0.30", before="0.31").applies is applies
    assert not row("this.module:function", loaded=True).applies
    assert row("json:loads", loaded=True).applies


def test_installing_twice_wraps_once() -> None:
    plugin.register()
    before = {each.target: _there(each) for each in PATCHES if each.stage is Stage.PLUGIN and each.applies}
    plugin.register()
    assert {target: _there(next(each for each in PATCHES if each.target == target)) for target in before} == before
    wrappers = {target: getattr(function, PATCHED_BY) for target, function in before.items()}
    for each in PATCHES:
        if each.stage is Stage.PLUGIN and each.applies:
            assert wrappers[each.target].count(each.wrapper) == 1
    assert wrappers["vllm.v1.engine.async_llm:AsyncLLM.generate"] == (
        "vllm_fixes.resending:resend_on_cache_miss",
        "api_server.rendered_features:record_prompt",
        "api_server.escalation:ask_again_if_unsure",
        "api_server.first_tokens:observe_first_tokens",
    )


def test_nothing_adapts_to_load_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics.loggers import StatLoggerManager

    from promprune_vllm.engine.api_server import load_monitor

    monkeypatch.delenv("PROMPRUNE_ADAPT_TO_LOAD", raising=False)
    before = StatLoggerManager.record
    plugin.register()
    assert StatLoggerManager.record is before
    assert load_monitor.current_level() == 1


def _there(patch: Patch) -> Any:
    owner, name = patch.owner()
    return getattr(owner, name)


ALONE = """
import json, sys
from vllm import LLM
LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=2, seed=0)
from tests.patched import patched
print("PATCHED", json.dumps({"patched": sorted(patched()), "loaded": sorted(sys.modules)}))
"""


def test_in_an_offline_program_what_is_patched_is_what_the_rows_say(tmp_path: Path) -> None:
    """All in one process, for a model with M-RoPE: nothing without a row, no row without its effect."""
    model = build_family_model("qwen2_5_vl", tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(model)],
        env={
            **os.environ,
            **UNMEASURED,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "PYTHONPATH": runner.python_path(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("PATCHED "))
    found = json.loads(told.removeprefix("PATCHED "))
    stages = (Stage.PLUGIN, Stage.PROCESSOR, Stage.SCHEDULER, *WORKER, Stage.MROPE_CPU)
    assert set(found["patched"]) == targets(found["loaded"], *stages)
