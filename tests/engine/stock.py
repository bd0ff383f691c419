"""What vLLM answers without the plugin, from a process of its own, and the prompts it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.clips import Clip
from tests.conftest import UNMEASURED
from tests.engine.family_engine import SHAPES, FamilyEngine
from tests.engine.family_facts import UNLOADABLE

CLIP = "a clip between images"  # a single one: GLM takes no more videos in a prompt
_SCRIPT = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import torch
torch.set_num_threads(int(sys.argv[2]))
from tests.engine import stock
from tests.engine.family_engine import FamilyEngine
answers = {}
for family, model in json.loads(sys.argv[1]).items():
    engine = FamilyEngine(family, model)
    assert "promprune" not in type(engine.model).__module__
    answers[family] = {}
    for name, media in stock.media(engine).items():
        engine.forget()  # images that are encoded one by one are rounded otherwise than together
        answers[family][name] = stock.answer(engine.generate([engine.ask(*media)])[0])
    engine.close()
print("ANSWERS", json.dumps(answers))
"""


def media(engine: FamilyEngine) -> dict[str, tuple[str | Clip, ...]]:
    """Images and clips of each prompt, by name: the shapes, and ``CLIP`` where the family takes videos."""
    shapes = SHAPES if "image" in engine.modalities else ()
    asked: dict[str, tuple[str | Clip, ...]] = {shape: (shape,) for shape in shapes}
    return asked | ({CLIP: ("portrait", Clip(7), "tiny")} if "video" in engine.modalities else {})


def logprobs(output: Any) -> list[dict[int, float]]:
    """The logprobs of each step, by token."""
    return [{token: value.logprob for token, value in step.items()} for step in output.outputs[0].logprobs]


def answer(output: Any) -> Any:
    """An answer's tokens and logprobs, as they are after the way through JSON; equal if every bit is."""
    return json.loads(json.dumps([list(output.outputs[0].token_ids), logprobs(output)]))


def answers(models: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return ``answer`` by family and prompt, on as many threads: with another number vLLM rounds otherwise."""
    arguments = json.dumps({family: str(path) for family, path in models.items() if family not in UNLOADABLE})
    environment = {**os.environ, **UNMEASURED, "VLLM_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, arguments, str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    told: dict[str, dict[str, Any]] = json.loads(line.removeprefix("ANSWERS "))
    return told
