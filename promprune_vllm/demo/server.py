"""Starts ``promprune serve`` as a separate process and waits until it answers."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from promprune_vllm.demo.processes import supervised
from promprune_vllm.errors import DemoError

# Stages of vLLM's start that we show to the user, by the log line that begins them.
_STAGES = (
    ("Resolved architecture", "starting the engine"),
    ("Starting to load model", "loading the weights"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "opening the port"),
)
_SERVE = (sys.executable, "-m", "promprune_vllm", "serve")
_PORTS = (20_000, 30_000)  # the first one, and the one after the last
_MAX_SOCKET_FOLDER = 60  # bytes: socket paths are limited to 103 or 107, and vLLM adds a name of 36


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Args:
        url: Base address, without a trailing slash.
        log: File with the server's output.
        process: Its supervising process; the server and its workers are descendants.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def families(self, prefix: str = "") -> list[Metric]:
        """Return the metric families of ``/metrics``, only with samples whose name starts with ``prefix``."""
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
    """Return a port that nobody is listening on right now.

    It is outside the range from which the system assigns ports (Linux: 32768 and above): an engine that starts at
    the same time gets a dozen of those, and could take this one before the server listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


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
    """Serve a model on the loopback interface inside the block.

    The server never outlives this process, and its temporary files are removed, however this process ends.

    Args:
        model: Directory of the checkpoint.
        options: Options of ``promprune serve`` after the model.
        log: File for the server's output; a temporary one by default.
        port: Port; 0 for a free one.
        environment: Variables added to this process's environment.
        timeout_seconds: Time limit until ``/health`` is 200.
        on_stage: Called with each stage of the start.

    Raises:
        DemoError: The port is in use, or the server ended or did not answer in time; includes the end of its log.
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
    """Return the variable that moves temporary files to a folder, since vLLM does not remove its sockets."""
    return {"TMPDIR": str(folder)} if len(os.fsencode(folder)) <= _MAX_SOCKET_FOLDER else {}


def one_worker(options: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Add options and variables that make the engine use a single process on a CPU.

    By default vLLM uses two, and each polls while it waits for the other: on two cores, that costs a fifth of the
    throughput.
    """
    import torch

    if torch.cuda.is_available():
        return [*options], {**environment}
    return (
        [*options, "--distributed-executor-backend", "uni"],
        {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )


# Spinning threads starve a machine with two cores: requests took 0.3 to 2.6 s instead of 0.2 s.
_DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise DemoError(f"Port {port} is in use ({error.strerror}). Choose another with --port.") from error


def wait_until_healthy(
    server: Server, timeout_seconds: float = 600, on_stage: Callable[[str], None] = lambda _: None
) -> None:
    """Wait until a newly started server answers.

    Args:
        server: The server.
        timeout_seconds: Time limit.
        on_stage: Called with each new stage of the start.

    Raises:
        DemoError: The server ended, or did not answer in time; includes the end of its log.
    """
    deadline = time.monotonic() + timeout_seconds
    last_stage = ""
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise DemoError(f"The server exited with status {server.process.returncode}.\n{log_end(server.log)}")
        stage = _stage(server.log)
        if stage != last_stage:
            last_stage = stage
            on_stage(stage)
        if is_healthy(server.url, timeout_seconds=5):
            return
        time.sleep(0.25)
    raise DemoError(f"The server did not answer within {timeout_seconds:.0f} s.\n{log_end(server.log)}")


def _stage(log: Path) -> str:
    text = log.read_text(errors="replace")
    latest = "importing vLLM"
    for mark, stage in _STAGES:
        if mark in text:
            latest = stage
    return latest


def log_end(log: Path, lines: int = 25) -> str:
    """Return the last lines of a server's output, for an error message."""
    end = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"The end of its log, {log}:", *(f"  {line}" for line in end)])
