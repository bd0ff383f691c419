#!/usr/bin/env python3
"""Run vLLM's own tests with this plugin and without it, and tell what differs: `vllm_tests.py --only multimodal`.

The tests come from the sdist of the vLLM that is installed; they and what they need lie in the user's cache
directory. Known differences have their reasons in vllm_tests.toml. The exit status is 1 where a difference has no
reason there, or a reason no difference any more. The result goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setup_env import HERE, PIP, ROOT, Environment, SetupError, add_beside, run, say
from vllm_tests_compared import REASONS, compare, passes, read_reasons, text

STAND_INS = HERE / "vllm_tests_stand_ins.py"
OURS = "promprune"
TAKEN = ("tests", "examples", "pyproject.toml")
"""Of the sdist; not its vllm/, so that the installed one is imported."""
NEEDED = ("tblib==3.2.2", "pytest-asyncio==1.5.0")
DUMMY = "tests/plugins/vllm_add_dummy_endpoint_plugin"
"""A package of vLLM's that the tests of endpoint plugins want installed."""
OPTIONS = (
    *(
        "-p",
        "vllm_tests_recorder",
        "-p",
        "no:cacheprovider",
        "-p",
        "pytest_asyncio.plugin",
        "-p",
        "pytest_timeout",
    ),
    *("--disable-plugin-autoload", "--continue-on-collection-errors", "--timeout=300", "--durations=10", "-q"),
)
FAMILIES = "llava-1.5 or llava-v1.6 or Qwen2-VL-2B or Qwen2.5-VL-3B or Qwen3-VL-4B"
_KNOWN = """
from importlib.metadata import entry_points, packages_distributions, version
print(version(packages_distributions()["vllm"][0]).partition("+")[0])
print(*(each.name for each in entry_points(group="vllm.general_plugins")))
"""
_PROCESSING = "models/multimodal/processing"


@dataclass(frozen=True)
class Part:
    """Tests that run in one process, which stays below 3 GB: paths below vLLM's tests/, and pytest's -k."""

    paths: tuple[str, ...]
    keyword: str = ""


PARTS = (
    Part(
        (
            *("multimodal/test_processing.py", "multimodal/test_cache.py", "multimodal/test_parse.py"),
            *("multimodal/test_inputs.py", "multimodal/media/test_connector.py"),
            "plugins_tests/test_endpoint_plugins.py",
        )
    ),
    Part((f"{_PROCESSING}/test_common.py",), FAMILIES),
    Part(tuple(f"{_PROCESSING}/test_{family}.py" for family in ("llava_next", "qwen2_vl", "qwen3_vl"))),
    Part(("renderers",)),
    Part(("entrypoints/openai/chat_completion",)),
    Part(("v1/metrics", "v1/ec_connector/unit")),
    Part(("v1/core",)),
)


def select(parts: Iterable[Part], only: Sequence[str]) -> list[Part]:
    """Return the parts, or what of them lies at these paths, or below.

    Raises:
        SetupError: A path is in no part.
    """
    if not only:
        return list(parts)
    chosen = []
    for part in parts:
        below = [path for path in part.paths if any(_is_below(path, each) for each in only)]
        inside = [each for each in only if any(_is_below(each, path) for path in part.paths)]
        if paths := tuple(dict.fromkeys([*below, *inside])):
            chosen.append(Part(paths, part.keyword))
    found = [path for part in chosen for path in part.paths]
    if unknown := [each for each in only if not any(_is_below(path, each) for path in found)]:
        raise SetupError(f"not among the tests that are run: {', '.join(unknown)}")
    return chosen


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith((f"{folder.rstrip('/')}/", f"{folder}::"))


class Suite:
    """vLLM's tests, and what they need, in one folder for each version.

    Args:
        venv: Where vLLM and this plugin are installed. Nothing is added to it.
        cache: Holds a folder for each version.
    """

    def __init__(self, venv: Environment, cache: Path) -> None:
        self.venv = venv
        self.version, plugins = run(venv.python, "-c", _KNOWN).splitlines()
        self.plugins = plugins.split()
        if OURS not in self.plugins:
            raise SetupError(f"{venv.path} has no {OURS} among vLLM's plugins ({plugins}): make setup")
        self.folder = cache / self.version
        self.sources = self.folder / "sources"
        self.stand_ins = self.folder / f"stand-ins-{hashlib.sha256(STAND_INS.read_bytes()).hexdigest()[:8]}"

    def prepare(self) -> None:
        """Fetch the tests, install what they need, and make stand-ins for what they would download."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.sources.exists():
            say(f"fetching the tests of vLLM {self.version} into {self.folder}")
            with tempfile.TemporaryDirectory(dir=self.folder) as workshop:
                self._fetch(Path(workshop)).rename(self.sources)
        add_beside(
            self.venv, self.folder / "packages", "what vLLM's tests need", *NEEDED, str(self.sources / DUMMY)
        )
        if not self.stand_ins.exists():
            say("making stand-ins for the checkpoints and pictures that vLLM's tests would download")
            part = self.stand_ins.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            run(self.venv.python, str(STAND_INS), str(part), env=_paths(ROOT))
            part.rename(self.stand_ins)

    def _fetch(self, workshop: Path) -> Path:
        """Return a folder with what is taken of the sdist.

        pip only downloads an sdist together with its metadata, which takes vLLM's whole build environment to make.
        Without that it fails, and with --no-clean leaves the sdist behind, unpacked.
        """
        options = (
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--no-clean",
            "--dest",
            str(workshop),
        )
        failed = ""
        try:
            run(
                self.venv.python,
                *PIP,
                "download",
                *options,
                f"vllm=={self.version}",
                env={"TMPDIR": str(workshop)},
            )
        except SetupError as error:
            failed = str(error)
        for archive in workshop.rglob("vllm-*.tar.gz"):
            with tarfile.open(archive) as packed:
                packed.extractall(workshop, filter="data")
        found = next((path.parent.parent for path in workshop.rglob("tests/conftest.py")), None)
        if found is None:
            raise SetupError(f"the sdist of vLLM {self.version} cannot be had: {failed}")
        taken = workshop / "taken"
        taken.mkdir()
        for name in TAKEN:
            (found / name).rename(taken / name)
        return taken

    def run(self, paths: Sequence[str], keyword: str, *, with_plugin: bool) -> dict[str, tuple[str, str]]:
        """Run tests in one process and return their outcomes.

        Raises:
            SetupError: The process did not come to an end by itself.
        """
        mode = "with" if with_plugin else "without"
        log, outcomes = self.folder / f"{mode}.log", self.folder / f"{mode}.jsonl"
        outcomes.unlink(missing_ok=True)
        names = [name for name in self.plugins if name != OURS or with_plugin]
        env = {
            **os.environ,
            **_paths(self.sources, self.folder / "packages", HERE, ROOT),
            "VLLM_PLUGINS": ",".join(names),
            "VLLM_TESTS_OUTCOMES": str(outcomes),
            "VLLM_ASSETS_CACHE": str(self.stand_ins / "assets"),
            "HF_HOME": str(self.stand_ins),
            "HF_HUB_OFFLINE": "1",
        }
        words = (self.venv.python, "-m", "pytest", *OPTIONS, *(("-k", keyword) if keyword else ()), *paths)
        with log.open("ab") as output:
            done = subprocess.run(
                words, cwd=self.sources, env=env, stdout=output, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode not in (0, 1):
            raise SetupError(f"pytest ended with {done.returncode} {mode} the plugin: {log}")
        return {name: (outcome, failure) for name, outcome, failure in map(json.loads, outcomes.open())}


def _paths(*folders: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def run_both(suite: Suite, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the parts without the plugin and with it, and once more what differs: chance seldom does so twice."""
    runs: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for number, part in enumerate(parts, 1):
        started, names = time.monotonic(), " ".join(part.paths)
        for mode, found in runs.items():
            found.update(suite.run([f"tests/{path}" for path in part.paths], part.keyword, with_plugin=mode))
        say(f"{number} of {len(parts)}, {time.monotonic() - started:.0f} s: {names[:80]}")
    without, with_plugin = runs[False], runs[True]
    again = [name for name in without.keys() & with_plugin.keys() if without[name][0] != with_plugin[name][0]]
    if again:
        say(f"running again what differs: {len(again)} tests")
        for mode, found in runs.items():
            found.update(suite.run(sorted(again), "", with_plugin=mode))
    return without, with_plugin


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promprune" / "vllm-tests"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="paths below vLLM's tests/, with commas between")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="where vLLM and the plugin are installed"
    )
    parser.add_argument(
        "--cache", type=Path, default=cache, help="where the tests are kept (default: %(default)s)"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        parts = select(PARTS, [each for each in arguments.only.split(",") if each])
        suite = Suite(Environment(arguments.venv.absolute()), arguments.cache.absolute())
        suite.prepare()
        found = compare(*run_both(suite, parts), read_reasons(REASONS))
    except (SetupError, OSError) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    result = {"vllm": suite.version, **found}
    print(json.dumps(result, indent=2) if arguments.json else text(result))
    return int(not passes(result))


if __name__ == "__main__":
    sys.exit(main())
