"""A Docker engine of the tests' own, which leaves nothing behind.

It runs in namespaces of its own: its processes end, its mounts and networks vanish with the one process started
here, whatever happens to the tests. While images are built it shares the machine's network, to reach the package
registries. While the stack runs it has a network with nothing in it but the loopback interface and Docker's own
bridges, so that the ports the compose file publishes are never open on the machine, and cannot be taken there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOOLS = Path(sys.prefix) / "tools"
"""Where `make tools` unpacks Debian's packages; an engine that is on the PATH anyway does as well."""
_NEEDED = ("dockerd", "docker", "containerd", "runc", "iptables", "mmdebstrap", "prometheus", "setpriv", "unshare")
_LOOPBACK_UP = (
    "import fcntl, socket, struct;"
    "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH22x', b'lo', 0x1 | 0x40))"  # SIOCSIFFLAGS: up, running
)
_START_SECONDS, _STOP_SECONDS = 60, 30
_DISK_BYTES = 40 << 30


class EngineError(Exception):
    """The engine cannot be started here, or a command of it failed; the text is what it said."""


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment with the tools in it."""
    libraries = next(iter((TOOLS / "usr" / "lib").glob("*-linux-gnu")), TOOLS / "usr" / "lib")
    path = f"{TOOLS}/usr/sbin:{TOOLS}/usr/bin:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    own = {"LD_LIBRARY_PATH": str(libraries), "XTABLES_LIBDIR": str(libraries / "xtables")}
    return {**os.environ, "PATH": path, **(own if TOOLS.is_dir() else {}), **more}


def run(command: Sequence[str], timeout: float = 120, **more: str) -> str:
    """Run a command with the tools on its PATH and return what it printed.

    Raises:
        EngineError: It failed.
    """
    own = environment(**more)
    program = shutil.which(command[0], path=own["PATH"]) or command[0]
    done = subprocess.run(
        [program, *command[1:]], env=own, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        said = (done.stderr + done.stdout).strip()[-3000:]
        raise EngineError(f"`{' '.join(command)[:300]}` ended with {done.returncode}:\n{said}")
    return done.stdout


def missing() -> str:
    """Say why no engine can be started on this machine, or nothing."""
    if not sys.platform.startswith("linux") or os.geteuid():
        return "a container engine of the tests' own needs Linux and root"
    absent = [name for name in _NEEDED if not shutil.which(name, path=environment()["PATH"])]
    return f"not on this machine: {', '.join(absent)} (`make tools` fetches them on Debian)" if absent else ""


class Engine:
    """One data directory, and the daemon that is working on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "docker.sock"
        self.log = directory / "dockerd.log"
        self._process: subprocess.Popen[bytes] | None = None
        (directory / "data").mkdir()
        self._disk = self._make_disk()
        plugins = directory / "config" / "cli-plugins"
        plugins.mkdir(parents=True)
        for plugin in (TOOLS / "usr" / "libexec" / "docker" / "cli-plugins").glob("*"):
            (plugins / plugin.name).symlink_to(plugin)

    def start(self, *, isolated: bool) -> None:
        """Start the daemon, with the machine's network or one of its own.

        Raises:
            EngineError: It does not come up; with the end of its log.
        """
        daemon = ["dockerd", "--data-root", f"{self.directory}/data", "--exec-root", f"{self.directory}/exec"]
        daemon += ["--pidfile", f"{self.directory}/pid", "--host", f"unix://{self.socket}"]
        # Some sandboxes let nobody raise limits, and the engine's default is above theirs.
        daemon += ["--default-ulimit", "nofile=1024:1024"]
        if not isolated:
            daemon += ["--bridge=none", "--iptables=false", "--ip6tables=false"]
        # The mount is private to the namespace, and ends with it.
        first = [f"mount -o loop,noatime,nodiscard {self._disk} {self.directory}/data"] if self._disk else []
        first += [f'{sys.executable} -c "{_LOOPBACK_UP}"'] if isolated else []
        command = ["sh", "-c", " && ".join([*first, 'exec "$@"']), "sh", *daemon]
        namespaces = [
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            *(["--net"] if isolated else []),
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        self._wait_until_it_answers(self._process)

    def _make_disk(self) -> Path | None:
        """Make a file system of our own for the images: 100,000 files in one, which is deleted at once.

        Where the machine's file system discards the blocks of each deleted file, that takes ten minutes otherwise.
        """
        if not (shutil.which("mkfs.ext4", path=environment()["PATH"]) and Path("/dev/loop-control").exists()):
            return None
        disk = self.directory / "disk.img"
        with disk.open("wb") as file:
            file.truncate(_DISK_BYTES)  # sparse: only what is written takes room
        run(["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=1", str(disk)])
        return disk

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                self.docker("version", timeout=10)
                return
            except (EngineError, subprocess.TimeoutExpired):
                time.sleep(0.5)
        said = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        self.stop()
        raise EngineError("no container engine can be started here: " + " / ".join(said))

    def stop(self) -> None:
        """End the daemon and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None and (child := self._child(process)):
            os.kill(child, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        process.kill()  # takes the daemon along, and with it, the first of its namespace, all other processes
        process.wait()
        shutil.rmtree(self.directory / "exec", ignore_errors=True)
        (self.directory / "pid").unlink(missing_ok=True)

    def remove(self) -> None:
        """Stop, and delete all images and volumes."""
        self.stop()
        shutil.rmtree(self.directory)

    @staticmethod
    def _child(process: subprocess.Popen[bytes]) -> int | None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def docker(self, *arguments: str, timeout: float = 120, **more: str) -> str:
        """Run `docker ...` against this engine."""
        own = {"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_CONFIG": str(self.directory / "config")}
        return run(["docker", *arguments], timeout, **own, **more)

    def inspect(self, name: str) -> Any:
        """Return what `docker inspect` says of one container or image."""
        return json.loads(self.docker("inspect", name))[0]

    def inside(self, command: Sequence[str], timeout: float = 120, **more: str) -> str:
        """Run a command of the machine in the engine's network: as somebody at a shell of the Docker host."""
        assert self._process is not None
        child = self._child(self._process)
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{child}/ns/net", *command],
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise EngineError(f"{(done.stderr + done.stdout).strip()[-3000:]}")
        return done.stdout


class Compose:
    """`docker compose` with the files and the .env of a stack."""

    def __init__(self, engine: Engine, files: Sequence[Path], env_file: Path) -> None:
        self.engine = engine
        self._options = [option for file in files for option in ("-f", str(file))]
        self._options += ["--env-file", str(env_file)]

    def __call__(self, *arguments: str, timeout: float = 120, **more: str) -> str:
        """Run `docker compose ...`; variables of the machine that the files read do not count."""
        return self.engine.docker("compose", *self._options, *arguments, timeout=timeout, **more)

    def statuses(self) -> Mapping[str, str]:
        """Return the health of each service that is up."""
        lines = self("ps", "--format", "json").splitlines()
        return {row["Service"]: row["Health"] for row in map(json.loads, lines)}
