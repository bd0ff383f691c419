#!/usr/bin/env python3
"""Create, update or repair the CPU virtual environment: `setup_env.py --venv .venv`.

torch and torchvision are installed first (from pip's find-links, or else PyTorch's CPU index), then the lock, then
this project in editable mode. A finished environment has a stamp, so that a second call returns at once. All
messages go to stderr.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LOCK = HERE / "cpu-lock.txt"
SHIM = HERE / "torchvision_ops_shim.py"
# In a separate folder: PyTorch, vLLM and our kernels check whether triton can be imported, and most tests must not
# see it. Those of the CUDA kernels use the folder in a separate process, and vLLM in the tests takes it from there
# for Model Runner V2 (tests/runner).
TRITON, TRITON_FOLDER = "triton==3.7.1", "triton-only"
# lmms-eval requires about 150 packages, including another torch. To query a server it imports only 25 that vLLM
# does not have: 260 MB in a separate folder, used only by the test that runs lmms-eval as a process.
LMMS, LMMS_FOLDER = HERE / "lmms.txt", "lmms-only"
# LiteLLM's proxy needs other versions of packages that vLLM has too: 410 MB in a separate folder, used only by its
# test, which runs it with the Python that the environment was made from.
LITELLM, LITELLM_FOLDER = HERE / "litellm.txt", "litellm-only"
TORCH, TORCHVISION = "torch==2.13.0+cpu", "torchvision==0.28.0+cpu"
TORCH_INDEX = "--index-url=https://download.pytorch.org/whl/cpu"
PIP = ("-m", "pip", "--disable-pip-version-check")
STAMP = "promprune-setup"  # file in the venv: its path at creation, then a digest, "incomplete" or "failed"
IMPATIENT = {"UV_HTTP_TIMEOUT": "5", "UV_HTTP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "5", "PIP_RETRIES": "0"}


class SetupError(Exception):
    """A step failed; the text is shown to the user."""


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """Run a command and return its output; print every 10 s that it is still running; raise if it fails."""
    started, over = time.monotonic(), threading.Event()

    def beat() -> None:
        while not over.wait(10):
            say(f"  ... still running after {time.monotonic() - started:.0f} s")

    threading.Thread(target=beat, daemon=True).start()
    env = {**os.environ, "PIP_USER": "0", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    over.set()
    if done.returncode:
        shown = " ".join(command).replace("\n", "; ")
        output = [line for line in (done.stdout + done.stderr).splitlines() if line and "WARNING" not in line]
        raise SetupError("\n    ".join([f"`{shown}` failed with exit code {done.returncode}:", *output[-5:]]))
    return done.stdout.strip()


class Environment:
    """The virtual environment, and the tool that installs into it: uv if available, or else pip."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = str(path / "bin" / "python")
        self.uv: str | None = None

    def recorded(self) -> list[str]:
        stamp = self.path / STAMP
        return stamp.read_text().splitlines() if stamp.is_file() else []

    def record(self, state: str) -> None:
        (self.path / STAMP).write_text(f"{self.path}\n{state}\n")

    def create(self) -> None:
        """Create the venv unless a valid one exists; recreate an incomplete or moved one."""
        record = self.recorded()
        sound = not record or (record[0] == str(self.path) and record[1:] != ["incomplete"])
        if not (sound and Path(self.python).exists()):
            if self.path.exists() and any(self.path.iterdir()):
                if not record and not (self.path / "pyvenv.cfg").is_file():
                    raise SetupError(f"{self.path} is not a virtual environment: choose another path with --venv.")
                say(f"{self.path} is incomplete or was moved: recreating it")
                shutil.rmtree(self.path)
            say(f"creating {self.path} (Python {sys.version.split()[0]})")
            self.path.mkdir(parents=True, exist_ok=True)
            self.record("incomplete")
            run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(self.path))
        run(self.python, "-c", "import sys; assert sys.version_info >= (3, 11), 'older than Python 3.11'")
        self.record("incomplete")

    def get_uv(self) -> None:
        own = str(self.path / "bin" / "uv")
        self.uv = shutil.which("uv") or shutil.which(own)
        try:
            if not self.uv:
                run(self.python, *PIP, "install", "--quiet", "uv", env=IMPATIENT)
                self.uv = own
        except SetupError:
            say("uv cannot be installed: continuing with pip, which is slower")

    def install(self, what: str, *sources: list[str]) -> None:
        """Install from the first source that works, without dependencies; only the last gets the full timeouts."""
        say(f"installing {what}")
        pip = (self.python, *PIP, "install", "--quiet", "--no-input", "--no-deps")
        uv = (self.uv or "", "pip", "install", "--python", self.python, "--no-deps")
        for tool in [uv, pip] if self.uv else [pip]:
            for source in sources:
                try:
                    run(*tool, *source, env=IMPATIENT if source is not sources[-1] else None)
                    return
                except SetupError as error:
                    failure = error
            if tool is uv:  # it ignores pip's configuration, such as a private index
                say(f"{failure}\nsetup: trying the same with pip")
        raise failure

    def links(self) -> list[str]:
        """Return pip's configured find-links as options."""
        config = (self.python, *PIP, "config", "get", "global.find-links")  # prints nothing if none is set
        configured = subprocess.run(config, capture_output=True, text=True, check=False).stdout
        return [f"--find-links={link}" for link in os.environ.get("PIP_FIND_LINKS", configured).split()]

    def install_torch(self) -> None:
        local = ["--no-index", *self.links()]
        plain = TORCHVISION.partition("+")[0]
        self.install(TORCH, [*local, TORCH], [TORCH_INDEX, TORCH])
        self.install(plain, [*local, TORCHVISION], [TORCH_INDEX, TORCHVISION], [plain])

    def fill(self) -> None:
        self.install_torch()
        self.install(f"vLLM and the rest of {LOCK.name}", ["-r", str(LOCK)])
        self.finish()

    def finish(self) -> None:
        self.install("promprune-vllm, editable", ["-e", str(ROOT)])
        self.compile()
        self.repair_torchvision()

    def compile(self) -> None:
        say("compiling bytecode, which uv does not do")
        site = run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        # A few packages have files that are not valid in this Python version: they fail, but nobody imports them.
        compile_all = (self.python, "-m", "compileall", "-q", "-j", "0", site)
        subprocess.run(compile_all, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

    def repair_torchvision(self) -> None:
        say("checking that torchvision can be imported")
        message = run(self.python, str(SHIM))  # installs itself if torchvision cannot be imported without it
        if message:
            say(message)
            run(self.python, "-c", "import torchvision")


def add_beside(venv: Environment, folder: Path, what: str, *words: str) -> None:
    """Install packages into a folder that only some tests use, unless the folder already has them."""
    requirements = "\n".join(Path(word).read_text() if Path(word).is_file() else word for word in words)
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == requirements:
        return
    say(f"installing {what} into {folder}, for tests")
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    run(venv.python, *PIP, "install", "--quiet", "--no-input", "--no-deps", "--target", str(part), *words)
    (part / STAMP).write_text(requirements)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def ensure_libnuma() -> None:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        say("vLLM needs libnuma.so.1, which is missing")
        apt = "apt-get update -qq && apt-get install -y -qq --no-install-recommends libnuma1"
        if os.geteuid() or subprocess.run(apt, shell=True, stdout=sys.stderr, check=False).returncode:
            say("install libnuma1 (Fedora: numactl-libs) before starting vLLM; continuing")


def set_up(venv: Environment, use_uv: bool) -> None:
    """Update the environment; only one process at a time."""
    guard = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another setup is running here: waiting for it")
        fcntl.flock(guard, fcntl.LOCK_EX)
    inputs = b"".join(path.read_bytes() for path in (LOCK, SHIM, Path(__file__), ROOT / "pyproject.toml"))
    digest, started = hashlib.sha256(inputs).hexdigest(), time.monotonic()
    if Path(venv.python).exists() and venv.recorded() == [str(venv.path), digest]:
        say(f"{venv.path} is up to date")
        return
    try:
        venv.create()
        if use_uv:
            venv.get_uv()
        venv.fill()
    except Exception:
        if venv.recorded():
            venv.record("failed")  # a failure, not an interruption: what is installed is intact
        raise
    venv.record(digest)
    say(f"{venv.path} is ready ({time.monotonic() - started:.0f} s)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment's folder")
    parser.add_argument("--no-uv", action="store_true", help="install with pip only (slower)")
    parser.add_argument(
        "--triton", action="store_true", help="also install Triton, for the tests of vLLM and of the CUDA kernels"
    )
    parser.add_argument("--lmms", action="store_true", help="also install lmms-eval, for the test that runs it")
    parser.add_argument(
        "--litellm", action="store_true", help="also install LiteLLM's proxy, for the test that runs it"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not (3, 11) <= sys.version_info[:2] < (3, 15):
            version = sys.version.split()[0]
            raise SetupError(f"vLLM needs Python 3.11 to 3.14, this is {version}: make setup PYTHON=python3.11")
        ensure_libnuma()
        venv = Environment(arguments.venv.absolute())
        set_up(venv, use_uv=not arguments.no_uv)
        if arguments.triton and sys.platform == "linux":
            add_beside(venv, venv.path / TRITON_FOLDER, TRITON, TRITON)
        if arguments.lmms:
            add_beside(venv, venv.path / LMMS_FOLDER, "lmms-eval", "-r", str(LMMS))
        if arguments.litellm:
            add_beside(venv, venv.path / LITELLM_FOLDER, "LiteLLM's proxy", "-r", str(LITELLM))
    except (SetupError, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next call starts over")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
