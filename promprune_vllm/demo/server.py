"""Starts ``promprune serve`` as a process of its own and waits until it answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from promprune_vllm.demo.processes import supervised
from promprune_vllm.errors import DemoError

# What a newcomer is told while vLLM starts, by what its log says.
_STAGES = (
    ("Resolved architecture", "starting the engine"),
    ("Starting to load model", "loading the weights"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "opening the port"),
)
_SERVE = (sys.executable, "-m", "promprune_vllm", "serve")
_SOCKET_NAME_ROOM = 60  # bytes: the system takes 103 or 107, and vLLM names them by 36 characters


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers.

    Args:
        url: Base address, without a slash at the end.
        log: Everything the server printed.
        process: The process that watches over it; the server and its workers are its descendants.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def families(self, prefix: str = "") -> list[Metric]:
        """Return the metric families of ``/metrics``, or only the samples whose name starts with ``prefix``."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        if prefix:
            text = "".join(line for line in text.splitlines(keepends=True) if line.startswith(prefix))
        return list(text_string_to_metric_families(text))

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Return the samples of ``/metrics`` by name, summed over their labels."""
        totals: dict[str, float] = {}
        for family in self.families(prefix):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals


def is_healthy(url: str, timeout_seconds: float = 60) -> bool:
    """Return whether a server answers its ``/health`` with 200."""
    try:
        return httpx.get(f"{url}/health", timeout=timeout_seconds).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def free_port() -> int:
    """Return a port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    model: Path,
    *options: str,
    log: Path | None = None,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 600,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Iterator[Server]:
    """Serve a model on the loopback interface while the block is open.

    The server never outlives this process, and its temporary files are removed, whatever ends this process.

    Args:
        model: Directory of the checkpoint.
        options: Options of ``promprune serve`` after the model.
        log: File that gets the server's output; by default a temporary one.
        port: 0 takes a free one.
        environment: Added to this process's environment.
        timeout_seconds: How long the server may take until ``/health`` is 200.
        on_stage: Told what the server is doing while it starts.

    Raises:
        DemoError: The port is taken, or the server ended or did not answer in time; with the end of its log.
    """
    port = port or free_port()
    _require_free(port)
    with tempfile.TemporaryDirectory(prefix="promprune-server-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        log = log or folder / "server.log"
        words = [*_SERVE, str(model), "--host", "127.0.0.1", "--port", str(port), *options]
        variables = {**_DEFAULTS, **os.environ, **_QUIET, **_temporary(folder), **(environment or {})}
        with (
            log.open("wb") as output,
            supervised(words, folder=folder, stdout=output, stderr=subprocess.STDOUT, env=variables) as process,
        ):
            server = Server(f"http://127.0.0.1:{port}", log, process)
            wait_until_healthy(server, timeout_seconds, on_stage)
            yield server


def _temporary(folder: Path) -> dict[str, str]:
    """Return the variable that puts the server's temporary files into a folder: vLLM leaves its sockets behind."""
    return {"TMPDIR": str(folder)} if len(os.fsencode(folder)) <= _SOCKET_NAME_ROOM else {}


def one_worker(options: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Add to a server's options and environment that on a CPU the engine works in one process.

    vLLM takes two, and each polls while it waits for the other: on two cores, a fifth of what the server can do.
    """
    import torch

    if torch.cuda.is_available():
        return [*options], {**environment}
    return (
        [*options, "--distributed-executor-backend", "uni"],
        {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )


# Threads that spin while they wait starve a machine of two cores: requests took 0.3 to 2.6 s instead of 0.2 s.
_DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise DemoError(f"Port {port} is taken ({error.strerror}). Choose another with --port.") from error


def wait_until_healthy(
    server: Server, timeout_seconds: float = 600, on_stage: Callable[[str], None] = lambda _: None
) -> None:
    """Wait until a server that was just started answers.

    Args:
        server: Its address, log and process.
        timeout_seconds: Patience.
        on_stage: Called with what it does, whenever that changes.

    Raises:
        DemoError: It ended, or the time was over; with the end of its log.
    """
    deadline = time.monotonic() + timeout_seconds
    told = ""
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise DemoError(f"The server ended with status {server.process.returncode}.\n{log_end(server.log)}")
        stage = _stage(server.log)
        if stage != told:
            told = stage
            on_stage(stage)
        if is_healthy(server.url, timeout_seconds=5):
            return
        time.sleep(0.25)
    raise DemoError(f"The server did not answer within {timeout_seconds:.0f} s.\n{log_end(server.log)}")


def _stage(log: Path) -> str:
    text = log.read_text(errors="replace")
    reached = "importing vLLM"
    for mark, stage in _STAGES:
        if mark in text:
            reached = stage
    return reached


def log_end(log: Path, lines: int = 25) -> str:
    """Return the last lines of a server's output, for an error message."""
    end = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"The end of its log, {log}:", *(f"  {line}" for line in end)])
