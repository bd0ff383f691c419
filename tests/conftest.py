"""Shared by the whole suite: no network, quiet engines, one demo model."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import hypothesis
import pytest

from tests import runner

runner.use()
# Started with nohup or in a script's background, a suite would hand on to its servers that they ignore a closed
# terminal or Ctrl-C.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# A slow machine is no failure.
hypothesis.settings.register_profile("promprune", deadline=None)
hypothesis.settings.load_profile("promprune")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve a machine of two cores
# With AMX, the rounding of a product in bfloat16 depends on its height: a batch then differs from its requests one
# by one, in vLLM alone too.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")

FOLDERS = ("unit", "parity", "kernels", "engine", "server", "deploy")  # in this order: quick failures first
QUESTION = "What is in the picture?"
VISUAL_TOKENS = 576
# For processes that run what another test measures: measured, vLLM takes half again as long to be imported.
UNMEASURED = {"COVERAGE_PROCESS_CONFIG": ""}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep folders together, modules that share engines (``TOGETHER``), and in those the tests of one engine.

    Inside, pytest-randomly has shuffled before, and pytest grouped by fixture. Modules that share come first
    in their folder: they take longest, and of two processes none should begin with them when the other is done.
    """
    root, first = Path(__file__).parent, {}

    def place(item: pytest.Item) -> tuple[int, int, int, int]:
        folder = FOLDERS.index(item.path.relative_to(root).parts[0])
        together = getattr(getattr(item, "module", None), "TOGETHER", None)
        if together is None:
            return folder, 1, first.setdefault(item.path, len(first)), 0
        engine = getattr(item, "callspec", None) and item.callspec.params.get("engine")  # type: ignore[attr-defined]
        return folder, 0, first.setdefault(together, len(first)), first.setdefault((together, engine), len(first))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Let torch's loggers hand on what they get, as loggers do.

    Around every phase of every test, pytest hooks onto each logger that does not. torch has more than forty, and
    hooking took a tenth of the unit tests' time.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "torch" and isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test of an engine or a server runs on another runner than was chosen."""
    if any(item.get_closest_marker(name) for name in ("engine", "server")) and (why := runner.missing()):
        pytest.fail(why, pytrace=False)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    from promprune_vllm.demo.model import find_or_build_demo_model

    return find_or_build_demo_model()


@pytest.fixture(params=["fast", "reference"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the CPU path and on the reference."""
    monkeypatch.setenv("PROMPRUNE_KERNELS", request.param)
    return str(request.param)
