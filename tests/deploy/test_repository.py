"""What GitHub and pre-commit are told: their own schemas accept it, and it runs what developers run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import promprune_vllm
from tests.documents import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="the sdist has no .github")
BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
SCHEMAS = [
    *((path, "vendor.github-workflows") for path in WORKFLOWS),
    *((path, "custom.github-workflows-require-timeout") for path in WORKFLOWS),
    *((path, "vendor.github-issue-forms") for path in FORMS),
    (ROOT / "CITATION.cff", "vendor.citation-file-format"),
]


def run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("path", "schema"), SCHEMAS, ids=lambda value: getattr(value, "name", value))
def test_its_schema_accepts_it(path: Path, schema: str) -> None:
    run(BIN / "check-jsonschema", "--builtin-schema", schema, "--default-filetype", "yaml", path)


def test_pre_commit_accepts_its_configuration() -> None:
    run(BIN / "pre-commit", "validate-config", ROOT / ".pre-commit-config.yaml")


def test_workflows_and_hooks_run_what_developers_run() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    workflows = [yaml.safe_load(path.read_text()) for path in WORKFLOWS]
    steps = [step for each in workflows for job in each["jobs"].values() for step in job["steps"]]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    commands = [step["run"] for step in steps if "run" in step] + [hook["entry"] for hook in hooks]
    made = [re.fullmatch(r"make (?:--silent )?([a-z0-9-]+)", command) for command in commands]
    assert len(made) > 4
    assert all(found and found.group(1) in targets for found in made), commands


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == promprune_vllm.__version__
