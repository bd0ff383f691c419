"""Nothing that a command of ours starts outlives it, however it ends."""

from __future__ import annotations

import functools
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from promprune_vllm.demo.server import Server, free_port, is_healthy
from promprune_vllm.demo.trained import TRAINED
from tests.server.conftest import OPTIONS
from tests.server.ending import COMMANDS, PROMPRUNE, TERMINAL, WAYS, Ended, ended, left_behind, running, until

pytestmark = pytest.mark.server
STATUS = {
    "SIGTERM": 128 + signal.SIGTERM,
    "SIGHUP": 128 + signal.SIGHUP,
    "SIGINT": 130,
    "SIGKILL": -signal.SIGKILL,
}
ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
# A program that serves with an engine in a process of its own, as every command does on a GPU.
HOLDER = f"""
import time
from pathlib import Path
from promprune_vllm.demo.server import serving
with serving(Path({str(TRAINED)!r}), *{OPTIONS!r}, environment={ENGINE!r}) as server:
    print(server.url, flush=True)
    time.sleep(3600)
"""


Run = tuple[str, str]  # (command, way)
GRID: tuple[Run, ...] = tuple((command, way) for command in COMMANDS for way in WAYS)
# Every way once: the others end by the same code, and take minutes.
OF_EACH_COMMIT: tuple[Run, ...] = tuple(zip(COMMANDS, WAYS, strict=False))
assert {way for _, way in OF_EACH_COMMIT} == {*WAYS}


@functools.cache
def outcomes(runs: tuple[Run, ...], url: str) -> dict[Run, Ended]:
    """End commands while what they start is starting, once for all tests."""
    with tempfile.TemporaryDirectory() as out:
        filled = [
            [word.format(url=url, out=f"{out}/{i}") for word in COMMANDS[command][1]]
            for i, (command, _) in enumerate(runs)
        ]
        words = [each if each[0] == "make" else [*PROMPRUNE, *each] for each in filled]
        found = ended(list(zip(words, (way for _, way in runs), strict=True)))
        return dict(zip(runs, found, strict=True))


def _cases() -> Iterator[Any]:
    for command, way in GRID:
        marks = () if (command, way) in OF_EACH_COMMIT else pytest.mark.release
        yield pytest.param(command, way, marks=marks, id=f"{command}-{way}")


@pytest.mark.parametrize(("command", "way"), [*_cases()])
def test_a_command_takes_with_it_what_it_is_starting(server: Server, command: str, way: str) -> None:
    run = (command, way)
    together = tuple(each for each in GRID if each[0] == command and each not in OF_EACH_COMMIT)
    found = outcomes(OF_EACH_COMMIT if run in OF_EACH_COMMIT else together, server.url)[run]
    asks = any("{url}" in word for word in COMMANDS[command][1])
    assert found.left == [], found.said
    assert found.ports or asks or command.startswith("bench gpu")  # whose first process is no server
    if way != TERMINAL and command != "make demo":
        assert found.status == STATUS[way], found.said


@pytest.mark.release
def test_a_killed_program_takes_its_server_with_the_engines_and_their_files_with_it() -> None:
    with running([sys.executable, "-c", HOLDER], "SIGKILL") as program:
        assert until(lambda: program.said.read_text().startswith("http") or program.first.poll() is not None)
        url = program.said.read_text().strip()
        assert is_healthy(url), url
        assert len(program.processes()) > 3  # the program, a supervisor, the server, its engine
        program.look_at_shared_memory()
        program.end("SIGKILL")
        assert left_behind(program, [int(url.rpartition(":")[2])]) == []


@pytest.mark.release
def test_a_server_that_is_hung_up_on_ends_with_its_engines() -> None:
    port = free_port()
    words = ("serve", str(TRAINED), "--host", "127.0.0.1", "--port", str(port), *OPTIONS)
    with running([*PROMPRUNE, *words], "SIGHUP", **ENGINE) as server:
        assert until(lambda: is_healthy(f"http://127.0.0.1:{port}") or server.first.poll() is not None)
        server.look_at_shared_memory()
        server.end("SIGHUP")
        assert left_behind(server, [port], lambda name: name.startswith("promprune")) == []  # vLLM leaves its own
