"""The README from top to bottom, as one user would run it, and the examples of docs/requests.md after it.

Nothing is edited but what this machine lacks. The published weights are the demo model's, in a local Hugging Face
cache; the word ``vllm`` is a script that runs ``promprune vllm``, since vLLM's own does not start beside its CPU
build (see ``engine/api_server/command_line.py``); and where another server has port 8000, another port is used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.processes import supervised
from promprune_vllm.demo.server import Server, _require_free, free_port, wait_until_healthy
from promprune_vllm.errors import DemoError
from tests import runner
from tests.conftest import UNMEASURED, VISUAL_TOKENS
from tests.documents import README, ROOT, example, examples

pytestmark = pytest.mark.server
REPOSITORY = "llava-hf/llava-1.5-7b-hf"
QUESTION_TOKENS = 60
"""More than the question and the template take, in bytes as tokens."""
PORT = 8000
"""The one that the documents name."""
ELSEWHERE = (example("compose"), example("offline"), example("compare"), example("library"))
"""Run by tests/deploy, below, and by tests/unit/test_documents.py."""


class User:
    """Somebody with a photograph and a shell, whose exported variables last from one block to the next.

    Args:
        directory: Where the shell is.
        weights: What Hugging Face's cache has for ``REPOSITORY``.
    """

    def __init__(self, directory: Path, weights: Path) -> None:
        self.directory = directory
        self._session = directory / "session"
        self._session.touch()
        shutil.copy(photo_path("coffee"), directory / "photo.jpg")
        vllm = directory / "bin" / "vllm"
        vllm.parent.mkdir()
        vllm.write_text('#!/bin/sh\nexec promprune vllm "$@"\n')
        vllm.chmod(0o755)
        cache = directory / "huggingface"
        _publish(weights, cache / "hub")
        paths = (str(vllm.parent), str(Path(sys.executable).parent), os.environ["PATH"])
        ours = {"OPENAI_BASE_URL", "OPENAI_API_KEY"}  # what the README itself exports
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in ours},
            **{"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "PATH": os.pathsep.join(paths)},
            **{"PYTHONPATH": runner.python_path(ROOT), **UNMEASURED},
        }
        self._port = PORT if _is_free(PORT) else free_port()

    @contextmanager
    def serving(self, line: str) -> Iterator[None]:
        """Keep a server running in another terminal, and wait until it answers."""
        port = () if self._port == PORT else ("--port", str(self._port))
        command = " ".join((line.partition("#")[0], *port))
        log = self.directory / "log"
        options: dict[str, Any] = {"cwd": self.directory, "env": self._environment, "stderr": subprocess.STDOUT}
        with log.open("wb") as output, supervised(["bash", "-c", command], stdout=output, **options) as process:
            wait_until_healthy(Server(f"http://127.0.0.1:{self._port}", log, process))
            yield

    def run(self, code: str, **environment: str) -> str:
        """Paste a block into the shell, or save it and run it if it is Python, and return what it prints."""
        if code.startswith(("import ", "from ")):
            (self.directory / "example.py").write_text(code)
            code = "python example.py"
        script = f"set -e\n. ./session\n{self._here(code)}\nexport -p > session"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.directory,
            env={**self._environment, **environment},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def _here(self, code: str) -> str:
        """Return an example as it is, unless another server has the port."""
        if self._port == PORT:
            return code
        selecting = f"promprune select --url http://127.0.0.1:{self._port}"
        return code.replace(f":{PORT}", f":{self._port}").replace("promprune select", selecting)


def _publish(weights: Path, hub: Path) -> None:
    """Put a checkpoint where Hugging Face's cache keeps a download of ``REPOSITORY``."""
    cached = hub / f"models--{REPOSITORY.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(weights, target_is_directory=True)


def _is_free(port: int) -> bool:
    try:
        _require_free(port)
    except DemoError:
        return False
    return True


@pytest.fixture
def user(demo_model: Path, tmp_path: Path) -> User:
    return User(tmp_path, demo_model)


def _is_prompt_of(kept: int, tokens: str | int) -> None:
    assert kept < int(tokens) < kept + QUESTION_TOKENS


def _last_number(printed: str) -> str:
    return str(re.findall(r"(\d+)$", printed.strip())[0])


def check_curl(printed: str, _: Path) -> None:
    reply = json.loads(printed)
    _is_prompt_of(64, reply["usage"]["prompt_tokens"])
    assert reply["model"] == REPOSITORY


def check_openai(printed: str, _: Path) -> None:
    _is_prompt_of(VISUAL_TOKENS // 4, _last_number(printed))


def check_stream(printed: str, _: Path) -> None:
    _is_prompt_of(64 + VISUAL_TOKENS, _last_number(printed))


def check_langchain(printed: str, _: Path) -> None:
    _is_prompt_of(64, re.findall(r"'input_tokens': (\d+)", printed)[0])


def check_count(printed: str, _: Path) -> None:
    assert [image["kept"] for image in json.loads(printed)["images"]] == [64, 144]


def check_inspect(printed: str, _: Path) -> None:
    reply = json.loads(printed)
    assert (reply["seen"], reply["kept"], len(reply["indices"])) == (VISUAL_TOKENS, 64, 64)


def check_pictures(printed: str, directory: Path) -> None:
    for name in ("overlay.png", "strip.png"):
        with Image.open(directory / name) as picture:
            assert picture.width > 300
        (directory / name).unlink()
    assert json.loads((directory / "kept.jsonl").read_text())["kept"] == 64


CHECKS: dict[str, Callable[[str, Path], None]] = {
    example("curl"): check_curl,
    example("openai"): check_openai,
    example("stream"): check_stream,
    example("langchain"): check_langchain,
    example("count"): check_count,
    example("inspect"): check_inspect,
    example("pictures"): check_pictures,
}
"""What each example shows."""


def test_the_readme_runs_from_top_to_bottom_and_the_page_of_requests_after_it(user: User) -> None:
    pages = (README, ROOT / "docs" / "requests.md")
    blocks = [example(name) for page in pages for name in examples(page)]
    installing, *blocks = [block for block in blocks if block not in ELSEWHERE]
    assert installing == example("serve"), "the README shows a request before the server"
    assert set(blocks) == set(CHECKS), "an example that nobody checks"
    install, serve = installing.splitlines()
    assert install.startswith("pip install . ")  # done already; tests/server/test_wheel.py does it
    with user.serving(serve):
        for block in blocks:
            CHECKS[block](user.run(block), user.directory)


@pytest.mark.release
def test_offline(user: User) -> None:
    _is_prompt_of(64, _last_number(user.run(example("offline"), VLLM_ENABLE_V1_MULTIPROCESSING="0")))


def test_methods_side_by_side(every_method: Server, user: User) -> None:
    user.run(example("compare").replace("promprune select", f"promprune select --url {every_method.url}"))
    with Image.open(user.directory / "sheet.png") as picture:
        assert picture.width > 300
