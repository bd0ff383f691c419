"""The compose stack, built and brought up once, in an engine of its own; gone before other folders' tests run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.deploy.docker_engine import Compose, Engine, EngineError, missing
from tests.deploy.images import DEPLOY, build_cpu_image, make_base_image, make_prometheus_image

API_KEY = "the-key-of-the-tests"


@dataclass(frozen=True, slots=True)
class Stack:
    """The stack as users have it, but for Grafana: server and Prometheus, healthy.

    Args:
        engine: The engine it runs in.
        compose: `docker compose` of the stack.
        healthy_seconds: From `up` until every service was healthy.
    """

    engine: Engine
    compose: Compose
    healthy_seconds: float

    def container(self, service: str) -> str:
        return self.compose("ps", "--quiet", service).strip()


def write_env(path: Path, **values: str) -> Path:
    """Write .env.example with values filled in, as its first line asks users to."""
    text = (DEPLOY / ".env.example").read_text()
    for name, value in values.items():
        text, found = re.subn(rf"^#?{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert found == 1, f".env.example has no {name}"
    path.write_text(text)
    return path


@pytest.fixture(scope="package")
def env_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("env")
    return write_env(directory / ".env", VLLM_API_KEY=API_KEY, GRAFANA_ADMIN_PASSWORD="none-of-admin")


@pytest.fixture(scope="package")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if reason := missing():
        pytest.skip(reason)
    engine = Engine(tmp_path_factory.mktemp("engine"))
    try:
        engine.start(isolated=False)
    except EngineError as error:
        pytest.skip(str(error))
    try:
        yield engine
    finally:
        engine.remove()


@pytest.fixture(scope="package")
def images(engine: Engine, env_file: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    workshop = tmp_path_factory.mktemp("images")
    pinned = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["prometheus"]["image"]
    make_base_image(engine, workshop)
    make_prometheus_image(engine, workshop, pinned)
    build_cpu_image(engine, workshop, env_file)


@pytest.fixture(scope="package")
def stack(images: None, engine: Engine, env_file: Path) -> Iterator[Stack]:
    """Up with the user's own files, nothing overridden: only Grafana is not asked for."""
    engine.stop()
    engine.start(isolated=True)
    compose = Compose(engine, [DEPLOY / "compose.yaml", DEPLOY / "compose.cpu.yaml"], env_file)
    started = time.monotonic()
    try:
        compose("up", "--detach", "--no-build", "--wait", "vllm", "prometheus", timeout=400)
    except EngineError as error:
        pytest.fail(f"{error}\n{compose('logs', '--tail', '60')}")
    yield Stack(engine, compose, time.monotonic() - started)
    compose("down", "--volumes", "--timeout", "10")
