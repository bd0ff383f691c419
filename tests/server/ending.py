"""Commands of ours that start processes, ways to end them, and what must be gone afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import runner
from tests.conftest import UNMEASURED

ROOT = Path(__file__).parents[2]
SUPERVISOR = "promprune_vllm.demo.supervisor"
PROMPRUNE = (sys.executable, "-m", "promprune_vllm")
GPU = ("bench", "gpu", "--device", "cpu", "--shape", "tiny")
# The module that starts the process, and words that come to it; {url} is a running server, {out} a folder.
COMMANDS: Mapping[str, tuple[str, Sequence[str]]] = {
    "demo": ("demo/run.py", ("demo", "--port", "0")),
    "demo --once": ("demo/run.py", ("demo", "--once")),
    "demo --traffic": ("demo/run.py", ("demo", "--traffic", "60", "--port", "0")),
    "bench serving": ("bench/serving.py", ("bench", "serving")),
    "bench serving --url": ("bench/load.py", ("bench", "serving", "--url", "{url}")),
    "bench soak": ("bench/soak_server.py", ("bench", "soak")),
    "bench gpu": ("bench/gpu/child.py", (*GPU, "--out", "{out}")),
    "bench gpu --only tests": ("bench/gpu/kernel_tests.py", (*GPU, "--only", "tests", "--out", "{out}")),
    "bench gpu --only vllm": ("bench/gpu/engine.py", (*GPU, "--only", "vllm", "--out", "{out}")),
    "eval": ("evaluation/server.py", ("eval", "--no-plots", "--out", "{out}")),
    "eval --lmms": (
        "evaluation/lmms.py",
        ("eval", "--out", "{out}", "--url", "{url}", "--lmms", "pope", "--lmms-command", "sh -c 'sleep 600'"),
    ),
    "make demo": (
        "demo/run.py",
        ("make", "-s", "demo", "SETUP=true", f"BIN={Path(sys.executable).parent}", "ARGS=--port 0"),
    ),
}
# Every other command, which starts no process; one that runs vLLM in its own process ends as vLLM does.
WITHOUT = {
    *("serve", "vllm", "methods", "families", "metrics", "calibrate", "demo-model", "select", "plan", "tune"),
    *("bench content", "bench prefill", "bench kernels"),
}
TERMINAL = "closed terminal"
WAYS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGKILL", TERMINAL)
PATIENCE_SECONDS = 500.0
# A terminal and a shell in it: the system tells that one when the terminal is closed, and it takes its jobs along.
_TERMINAL = "import pty, sys; pty.spawn(['sh', '-c', '\"$@\"; exit $?', 'sh', *sys.argv[1:]])"
_IN_A_TERMINAL = (sys.executable, "-c", _TERMINAL)


@dataclass(slots=True)
class Running:
    """A command that was started, with all that it starts in turn.

    Args:
        mark: Is in the environment of each of its processes.
        temporary: Where they put their temporary files.
        first: The process to be signalled.
        said: File with its output.
        shared: Shared memory that a process of its was seen to use.
    """

    mark: str
    temporary: Path
    first: subprocess.Popen[bytes]
    said: Path
    shared: set[str] = field(default_factory=set)

    def processes(self) -> list[psutil.Process]:
        """Return those that run."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("PROMPRUNE_TEST_MARK") == self.mark:
                    found.append(process)
        return found

    def started(self) -> list[list[str]]:
        """Return the command lines of what it runs under a supervisor."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if SUPERVISOR in process.cmdline():
                    found += [child.cmdline() for child in process.children()]
        return [
            words for words in found if words and SUPERVISOR not in words
        ]  # not one that is just being started

    def look_at_shared_memory(self) -> None:
        """Remember the shared memory in use now."""
        for process in self.processes():
            with suppress(psutil.Error):
                self.shared |= {each.path for each in process.memory_maps() if each.path.startswith("/dev/shm/")}

    def end(self, way: str) -> int | None:
        """End the command in one of the ways, and return its status where it has one of its own."""
        if way == TERMINAL:
            self.first.kill()  # the terminal's other end
            self.first.wait()
            return None
        number = getattr(signal, way)
        made = self.first.args[0] == "make"  # type: ignore[index]
        if made and way != "SIGTERM":  # the only one that make hands on; others come to the whole group
            os.killpg(self.first.pid, number)
        else:
            self.first.send_signal(number)
        status = self.first.wait(PATIENCE_SECONDS)
        return None if made else status


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of ending a command.

    Args:
        status: Its own, where it has one.
        ports: Of the servers it had started.
        left: What was left behind.
        said: Its output.
    """

    status: int | None
    ports: list[int]
    left: list[str]
    said: str


def until(true: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> bool:
    """Wait until something is true, and return whether it came to be."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True


@contextmanager
def running(words: Sequence[str], way: str, **environment: str) -> Iterator[Running]:
    """Start a command, and clear up after it if it does not itself."""
    with tempfile.TemporaryDirectory(prefix="ending-", ignore_cleanup_errors=True) as name:
        said = Path(name) / "said.txt"
        temporary = Path(name) / "t"
        temporary.mkdir()
        mark = uuid.uuid4().hex
        variables = {**os.environ, **UNMEASURED, "PROMPRUNE_TEST_MARK": mark, "TMPDIR": str(temporary)}
        variables |= {
            "SPT_NOENV": "1",
            "PYTHONPATH": runner.python_path(ROOT),
            **environment,
        }  # titles of vLLM's eat environments
        for each in ("MAKEFLAGS", "MAKELEVEL"):
            variables.pop(each, None)
        with said.open("wb") as output:
            first = subprocess.Popen(
                [*(_IN_A_TERMINAL if way == TERMINAL else ()), *words],
                **{"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT},
                env=variables,
                cwd=ROOT,
                start_new_session=True,
            )
        command = Running(mark, temporary, first, said)
        try:
            yield command
        finally:
            for process in command.processes():
                with suppress(psutil.Error):
                    process.kill()
            first.wait()


def port_of(words: Sequence[str]) -> int | None:
    """Return the port of a server's command line."""
    return int(words[words.index("--port") + 1]) if "--port" in words else None


def is_free(port: int) -> bool:
    """Return whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def left_behind(command: Running, ports: Sequence[int], ours: Callable[[str], bool] = bool) -> list[str]:
    """Return what there still is of a command that was ended, in words; of its files, those that are ours."""

    def left() -> list[str]:
        found = []
        for each in command.processes():
            with suppress(psutil.NoSuchProcess):  # it has ended since
                found.append(f"process {each.pid} {each.name()}")
        found += [f"port {port}" for port in ports if not is_free(port)]
        found += [path.name for path in command.temporary.iterdir() if ours(path.name)]
        return found + [path for path in command.shared if Path(path).exists()]

    until(lambda: not left(), 60)
    return left()


AT_A_TIME = 5


def ended(runs: Sequence[tuple[Sequence[str], str]]) -> list[Ended]:
    """Start commands, several at a time, and end each in its way while what it starts is still starting."""

    def one(run: tuple[Sequence[str], str]) -> Ended:
        words, way = run
        with running(words, way) as command:
            until(lambda: command.started() or command.first.poll() is not None)
            started = command.started()
            assert started, command.said.read_text(errors="replace")
            ports = [port for each in started if (port := port_of(each)) is not None]
            status = command.end(way)
            return Ended(status, ports, left_behind(command, ports), command.said.read_text(errors="replace"))

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(one, runs))
