"""Processes that end with the one that wants them: with plain commands in the place of servers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer

from promprune_vllm import cli
from promprune_vllm.demo.processes import supervised
from promprune_vllm.demo.supervisor import kill_group
from tests.server.ending import COMMANDS, ROOT, WITHOUT

PACKAGE = ROOT / "promprune_vllm"
SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")
# Starts a command that sleeps, says the ids of supervisor and command, and waits.
PARENT = """
import sys, time, psutil
from pathlib import Path
from promprune_vllm.demo.processes import end_on_signals, supervised
end_on_signals()
with supervised(sys.argv[2:], folder=Path(sys.argv[1])) as process:
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.01)
    print(process.pid, children[0].pid, flush=True)
    time.sleep(600)
"""


def _commands(group: Any, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def _calling(pattern: str) -> set[str]:
    """Return the modules with a call that looks like this."""
    call = re.compile(rf"(?<!def )\b{pattern}\(")
    return {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if call.search(path.read_text())}


def test_of_every_command_is_known_whether_it_starts_a_process() -> None:
    tried = {name.partition(" --")[0] for name in COMMANDS} - {"make demo"}
    known = set(_commands(typer.main.get_command(cli.app)))
    assert tried | WITHOUT == known, "say in tests/server/ending.py whether it starts a process"
    assert not tried & WITHOUT


def test_every_module_that_starts_a_process_is_tried_and_starts_it_supervised() -> None:
    tried = {module for module, _ in COMMANDS.values()}
    assert _calling("(serving|supervised)") == tried | {"demo/server.py"}
    starting = _calling(
        r"(subprocess|os|multiprocessing)\.(\w*run|Popen|\w*call|check_output|\w*spawn\w*|Process)"
    )
    # bench/provenance.py asks git and bench/gpu/environment.py the driver, which answer at once.
    assert starting | _calling(r"os\.(system|popen|fork\w*|exec\w+)") == {
        *("demo/processes.py", "demo/supervisor.py", "bench/provenance.py", "bench/gpu/environment.py")
    }


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_supervised_command_gives_its_status(tmp_path: Path, code: str, status: int) -> None:
    with supervised([sys.executable, "-c", code], folder=tmp_path) as process:
        assert process.wait(60) == status
    assert tmp_path.is_dir()  # its results may still be wanted


def test_a_command_ends_with_the_block_and_its_folder_goes(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with supervised(SLEEP, folder=folder) as process:
        _until(lambda: psutil.Process(process.pid).children())
        (command,) = psutil.Process(process.pid).children()
    assert not command.is_running()
    assert process.returncode is not None
    assert not folder.exists()


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs a command, whose folder is `folder`."""
    (folder := tmp_path / "folder").mkdir()
    words = [sys.executable, "-c", PARENT, str(folder), *SLEEP]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        yield process
        process.kill()  # else a test that failed would wait for it


def _said(parent: subprocess.Popen[bytes]) -> tuple[psutil.Process, psutil.Process]:
    assert parent.stdout is not None
    supervisor, command = (psutil.Process(int(each)) for each in parent.stdout.readline().split())
    return supervisor, command


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_whatever_ends_the_parent_ends_the_command(
    parent: subprocess.Popen[bytes], tmp_path: Path, name: str, times: int
) -> None:
    supervisor, command = _said(parent)
    number = signal.Signals[name]
    for _ in range(times):
        parent.send_signal(number)
    # Python ends by SIGINT itself where nobody catches it, as by SIGKILL.
    assert parent.wait(60) == (128 + number if name in ("SIGTERM", "SIGHUP") else -number)
    assert name == "SIGKILL" or not _runs(command)
    _until(lambda: not _runs(command) and not _runs(supervisor) and not (tmp_path / "folder").exists())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process that its parent has gone")
def test_a_killed_supervisor_takes_the_command_with_it(parent: subprocess.Popen[bytes]) -> None:
    supervisor, command = _said(parent)
    supervisor.kill()
    _until(lambda: not _runs(command))
    parent.terminate()
    assert parent.wait(60) == 128 + signal.SIGTERM


def test_a_group_is_killed_whole_though_it_ignores_what_can_be_ignored() -> None:
    stubborn = (
        "trap '' INT TERM HUP; (trap '' INT TERM HUP; while :; do sleep 1; done) & echo; while :; do sleep 1; done"
    )
    with subprocess.Popen(["sh", "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True) as group:
        assert group.stdout is not None
        group.stdout.readline()
        group.send_signal(signal.SIGINT)
        members = [psutil.Process(group.pid), *psutil.Process(group.pid).children(recursive=True)]
        assert len(members) > 1
        kill_group(group.pid)
    assert not any(_runs(each) for each in members)


def test_signals_that_are_ignored_stay_so(tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from promprune_vllm.demo.processes import end_on_signals, hang_up_as_sigterm\n"
        "end_on_signals(); hang_up_as_sigterm()\n"
        "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\n"
        "assert callable(signal.getsignal(signal.SIGTERM))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
