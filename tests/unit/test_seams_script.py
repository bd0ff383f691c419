"""`make seams`: what a wheel of vLLM has changed, and the issue that is opened when nobody has tested it."""

from __future__ import annotations

import importlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from promprune_vllm.engine.compat import versions
from tests.documents import ROOT
from tests.vllm_copy import copy_of_vllm

LLAVA = "vllm.model_executor.models.llava"
OLD = "image_input = self._parse_and_validate_image_input(**kwargs)"
NEW = "image_input = self._parse_and_validate_image_input(**{**kwargs})"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "deploy" / "environment"))
        yield importlib.import_module("seams")


def test_the_table_is_written_as_it_is_read(script: ModuleType) -> None:
    assert script.compress(script.expand(versions.TESTED)) == script.TABLE.read_text()


def test_only_python_files_of_a_wheel_are_unpacked(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "WHEELS", tmp_path)
    with zipfile.ZipFile(tmp_path / "vllm-0.98.0-cp38-abi3-linux.whl", "w") as wheel:
        for name in ("vllm/__init__.py", "vllm/_C.abi3.so", "other/__init__.py"):
            wheel.writestr(name, "")
    version, package = script.unpack("0.98.0")
    assert version == "0.98.0"
    assert [path.name for path in package.iterdir()] == ["__init__.py"]
    assert not (package.parent / "other").exists()


def test_what_moved_is_a_list(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    minor = versions.installed_minor()
    package = copy_of_vllm(tmp_path, f"{minor}.99", {LLAVA: (OLD, NEW)}) / "vllm"
    text = script.report(f"{minor}.99", package)
    assert text.startswith(f"## vLLM {minor}.99, compared with {versions.reference(minor)}\n")
    assert "Off: LLaVA (budgets for LlavaForConditionalGeneration get HTTP 400)" in text
    row = f"| `{LLAVA}:LlavaForConditionalGeneration.embed_multimodal` | core | LLaVA | code changed |"
    assert [line for line in text.splitlines() if line.startswith("| `")] == [row]


def test_an_issue_is_opened_once(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program in the place of GitHub's."""
    told = tmp_path / "told"
    program = tmp_path / "gh"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {told}\ncase "$2" in list) cat {tmp_path}/issues;; *) echo opened;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    text = "## vLLM 0.98.0, compared with 0.33.0\n\nOff: resending\n"
    (tmp_path / "issues").write_text("[]")
    script.open_issue(text)
    created = "issue create --title vLLM 0.98.0, compared with 0.33.0 --body Off: resending"
    assert told.read_text().splitlines()[-1] == created
    (tmp_path / "issues").write_text(json.dumps([{"title": "vLLM 0.98.0, compared with 0.33.0"}]))
    script.open_issue(text)
    assert told.read_text().count("create") == 1
