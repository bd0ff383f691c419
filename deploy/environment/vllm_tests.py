#!/usr/bin/env python3
"""Run vLLM's own tests with and without this plugin, and report differences: `vllm_tests.py --only multimodal`.

The tests come from the sdist of the installed vLLM version; they and their dependencies are kept in the user's
cache directory. vllm_tests.toml has the reasons of known differences. The exit status is 1 if a difference has no
reason there, or a reason no longer has a difference. The result goes to stdout, everything else to stderr.
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
USED = ("tests", "examples", "pyproject.toml")
"""What we use of the sdist; not its vllm/, so that the installed one is imported."""
NEEDED = ("tblib==3.2.2", "pytest-asyncio==1.5.0")
DUMMY = "tests/plugins/vllm_add_dummy_endpoint_plugin"
"""A vLLM package that the tests of endpoint plugins need installed."""
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
    """Tests that run in one process of less than 3 GB: paths below vLLM's tests/, and pytest's -k."""

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
    """Return the parts, restricted to tests at or below these paths if there are any.

    Raises:
        SetupError: A path is not in any part.
    """
    if not only:
        return list(parts)
    selected = []
    for part in parts:
        below = [path for path in part.paths if any(_is_below(path, each) for each in only)]
        inside = [each for each in only if any(_is_below(each, path) for path in part.paths)]
        if paths := tuple(dict.fromkeys([*below, *inside])):
            selected.append(Part(paths, part.keyword))
    selected_paths = [path for part in selected for path in part.paths]
    if unknown := [each for each in only if not any(_is_below(path, each) for path in selected_paths)]:
        raise SetupError(f"not among the tests that we run: {', '.join(unknown)}")
    return selected


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith((f"{folder.rstrip('/')}/", f"{folder}::"))


class Suite:
    """vLLM's tests and their dependencies, in one folder per version.

    Args:
        venv: Environment with vLLM and this plugin. Nothing is added to it.
        cache: Directory for the folders of all versions.
    """

    def __init__(self, venv: Environment, cache: Path) -> None:
        self.venv = venv
        self.version, plugins = run(venv.python, "-c", _KNOWN).splitlines()
        self.plugins = plugins.split()
        if OURS not in self.plugins:
            raise SetupError(f"{venv.path} has no {OURS} among vLLM's plugins ({plugins}): run `make setup`")
        self.folder = cache / self.version
        self.sources = self.folder / "sources"
        self.stand_ins = self.folder / f"stand-ins-{hashlib.sha256(STAND_INS.read_bytes()).hexdigest()[:8]}"

    def prepare(self) -> None:
        """Fetch the tests, install their dependencies, and build stand-ins for what they would download."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.sources.exists():
            say(f"fetching the tests of vLLM {self.version} into {self.folder}")
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                self._fetch(Path(scratch)).rename(self.sources)
        add_beside(
            self.venv, self.folder / "packages", "dependencies of vLLM's tests", *NEEDED, str(self.sources / DUMMY)
        )
        if not self.stand_ins.exists():
            say("building stand-ins for the checkpoints and pictures that vLLM's tests would download")
            part = self.stand_ins.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            run(self.venv.python, str(STAND_INS), str(part), env=_paths(ROOT))
            part.rename(self.stand_ins)

    def _fetch(self, scratch: Path) -> Path:
        """Return a folder with the parts of the sdist that we use.

        When pip downloads an sdist it also builds its metadata, which needs vLLM's whole build environment.
        Without that it fails, but with --no-clean it leaves the unpacked sdist behind.
        """
        options = (
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--no-clean",
            "--dest",
            str(scratch),
        )
        failed = ""
        try:
            run(
                self.venv.python,
                *PIP,
                "download",
                *options,
                f"vllm=={self.version}",
                env={"TMPDIR": str(scratch)},
            )
        except SetupError as error:
            failed = str(error)
        for archive in scratch.rglob("vllm-*.tar.gz"):
            with tarfile.open(archive) as packed:
                packed.extractall(scratch, filter="data")
        sdist = next((path.parent.parent for path in scratch.rglob("tests/conftest.py")), None)
        if sdist is None:
            raise SetupError(f"the sdist of vLLM {self.version} cannot be downloaded: {failed}")
        sources = scratch / "sources"
        sources.mkdir()
        for name in USED:
            (sdist / name).rename(sources / name)
        return sources

    def run(self, paths: Sequence[str], keyword: str, *, with_plugin: bool) -> dict[str, tuple[str, str]]:
        """Run tests in one process and return their outcomes.

        Raises:
            SetupError: pytest crashed or was stopped.
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
            raise SetupError(f"pytest exited with {done.returncode} {mode} the plugin: see {log}")
        return {name: (outcome, failure) for name, outcome, failure in map(json.loads, outcomes.open())}


def _paths(*folders: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def run_both(suite: Suite, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the parts without and with the plugin, then rerun the tests that differ, to rule out chance."""
    runs: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for number, part in enumerate(parts, 1):
        started, names = time.monotonic(), " ".join(part.paths)
        for mode, outcomes in runs.items():
            outcomes.update(suite.run([f"tests/{path}" for path in part.paths], part.keyword, with_plugin=mode))
        say(f"{number} of {len(parts)}, {time.monotonic() - started:.0f} s: {names[:80]}")
    without, with_plugin = runs[False], runs[True]
    again = [name for name in without.keys() & with_plugin.keys() if without[name][0] != with_plugin[name][0]]
    if again:
        say(f"rerunning the {len(again)} tests that differ")
        for mode, outcomes in runs.items():
            outcomes.update(suite.run(sorted(again), "", with_plugin=mode))
    return without, with_plugin


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promprune" / "vllm-tests"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="paths below vLLM's tests/, comma-separated")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="environment with vLLM and the plugin")
    parser.add_argument("--cache", type=Path, default=cache, help="folder for the tests (default: %(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        parts = select(PARTS, [each for each in arguments.only.split(",") if each])
        suite = Suite(Environment(arguments.venv.absolute()), arguments.cache.absolute())
        suite.prepare()
        comparison = compare(*run_both(suite, parts), read_reasons(REASONS))
    except (SetupError, OSError) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    result = {"vllm": suite.version, **comparison}
    print(json.dumps(result, indent=2) if arguments.json else text(result))
    return int(not passes(result))


if __name__ == "__main__":
    sys.exit(main())
