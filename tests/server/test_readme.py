"""The examples of the README, run as they stand against a real server. Its weights are the demo model's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.server import Server
from tests.conftest import UNMEASURED, VISUAL_TOKENS
from tests.documents import example

pytestmark = pytest.mark.server
REPOSITORY = "llava-hf/llava-1.5-7b-hf"
QUESTION_TOKENS = 60
"""More than the question and the template take, in bytes as tokens."""


def run(code: str, interpreter: list[str], directory: Path, **environment: str) -> str:
    shutil.copy(photo_path("coffee"), directory / "photo.jpg")
    done = subprocess.run(
        [*interpreter, code],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def online(server: Server) -> dict[str, str]:
    return {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none"}


def test_curl(server: Server, tmp_path: Path) -> None:
    reply = json.loads(run(local(example("curl"), server), ["bash", "-c"], tmp_path))
    assert 64 < reply["usage"]["prompt_tokens"] < 64 + QUESTION_TOKENS


def test_openai(server: Server, tmp_path: Path) -> None:
    printed = run(example("openai"), [sys.executable, "-c"], tmp_path, **online(server))
    (quarter,) = (int(number) for number in re.findall(r"(\d+)$", printed.strip()))
    assert VISUAL_TOKENS // 4 < quarter < VISUAL_TOKENS // 4 + QUESTION_TOKENS


def test_stream(server: Server, tmp_path: Path) -> None:
    printed = run(example("stream"), [sys.executable, "-c"], tmp_path, **online(server))
    (both,) = (int(number) for number in re.findall(r"(\d+)$", printed.strip()))
    assert 64 + VISUAL_TOKENS < both < 64 + VISUAL_TOKENS + QUESTION_TOKENS


def test_count(server: Server, tmp_path: Path) -> None:
    reply = json.loads(run(local(example("count"), server), ["bash", "-c"], tmp_path))
    assert [image["kept"] for image in reply["images"]] == [64, 144]


def test_inspect(server: Server, tmp_path: Path) -> None:
    reply = json.loads(run(local(example("inspect"), server), ["bash", "-c"], tmp_path))
    assert (reply["seen"], reply["kept"], len(reply["indices"])) == (VISUAL_TOKENS, 64, 64)


@pytest.mark.parametrize("code", [example("select"), example("pictures")], ids=["select", "pictures"])
def test_pictures(every_method: Server, tmp_path: Path, code: str) -> None:
    code = code.replace("promprune select", f"{sys.executable} -m promprune_vllm select --url {every_method.url}")
    run(f"set -e\n{code}", ["bash", "-c"], tmp_path)
    for made in re.findall(r"--out (\S+)", code):
        with Image.open(tmp_path / made) as picture:
            assert picture.width > 300
    if "kept.jsonl" in code:
        assert json.loads((tmp_path / "kept.jsonl").read_text())["kept"] == 64


def local(code: str, server: Server) -> str:
    """An example that asks a server of this machine; its own port may be taken."""
    return code.replace("http://127.0.0.1:8000", server.url).replace("localhost:8000", server.url)


def test_langchain(server: Server, tmp_path: Path) -> None:
    printed = run(example("langchain"), [sys.executable, "-c"], tmp_path, **online(server))
    (tokens,) = re.findall(r"'input_tokens': (\d+)", printed)
    assert 64 < int(tokens) < 64 + QUESTION_TOKENS


def test_offline(demo_model: Path, tmp_path: Path) -> None:
    """The published name leads to the demo model, the way Hugging Face's cache keeps a download."""
    cached = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(demo_model, target_is_directory=True)
    script = tmp_path / "offline.py"
    script.write_text(example("offline"))
    directory = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), **UNMEASURED}
    printed = run(str(script), [sys.executable], tmp_path, **directory, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    (tokens,) = re.findall(r"(\d+)$", printed.strip())
    assert 64 < int(tokens) < 64 + QUESTION_TOKENS
