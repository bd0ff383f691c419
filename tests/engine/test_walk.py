"""The walk of one request in docs/how-it-works.md is the one that the code takes."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import DEMO, Engine

pytestmark = pytest.mark.engine
TOGETHER = DEMO
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "promprune_vllm"
Step = tuple[str, str]


def walk() -> list[Step]:
    """Every step of the document: file and function."""
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    block = text.split("```")[1]
    return re.findall(r"^  (\S+\.py) +(\w+)", block, re.MULTILINE)


def test_every_step_exists_and_no_file_comes_twice() -> None:
    steps = walk()
    assert len(steps) >= 15
    files = [file for file, _ in steps]
    assert len(set(files)) == len(files)
    for file, function in steps:
        nodes = ast.walk(ast.parse((PACKAGE / file).read_text()))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        assert function in {node.name for node in nodes if isinstance(node, kinds)}, (file, function)


def test_the_steps_run_in_the_order_of_the_document(engine: Engine) -> None:
    """From the processor on. What comes before it only an HTTP request passes: tests/engine/test_seam.py."""
    steps = walk()
    inside = steps[steps.index(("engine/api_server/processor.py", "apply")) : -1]
    called: list[Step] = []

    def record(frame: Any, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(f"{PACKAGE}/"):
            # A wrapper of ours runs as the function inside the one that is named.
            names = [each for each in frame.f_code.co_qualname.split(".") if each != "<locals>"]
            called.extend((path.removeprefix(f"{PACKAGE}/"), name) for name in names)

    engine.forget()
    prompt = engine.prompt(("coffee", 64))
    sys.setprofile(record)
    try:
        engine.generate([prompt], tokens=1)
    finally:
        sys.setprofile(None)
    first = {step: called.index(step) for step in inside if step in called}
    assert list(first) == inside
    assert sorted(first.values()) == list(first.values())
