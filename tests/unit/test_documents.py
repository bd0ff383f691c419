"""The documents are true: tests that they name exist, examples run, links lead somewhere."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deploy.documents import evaluation
from deploy.documents.blocks import BLOCKS, replace, write
from deploy.documents.blocks import PAGES as BUILT
from promprune_vllm.cli import app
from promprune_vllm.demo.trained import TRAINED
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.records import FILE, Log
from tests.documents import BLOCK, PAGES, README, ROOT, example, passages, table, text
from tests.figures import DEPENDS_ON, find_figures, git, has_all_commits, is_out_of_date, kind_of, patterns
from tests.unit.evaluated import RUN, answers, records

TEXTS = {".md", ".py", ".sh", ".yaml", ".yml", ".html", ".js", ".example", ".cpu", ".cuda"}
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OUT_OF_DATE: dict[str, str] = {}
"""Figures (``Figures.name``) of something that has changed since. Whoever measures them anew removes them here."""


def test_every_test_that_the_security_notes_name_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text()))
    there = {
        name for file in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(named) > 15
    assert named - there == set()


@pytest.mark.parametrize("name", BLOCKS)
def test_generated_tables_are_up_to_date(name: str) -> None:
    assert table(name) == BLOCKS[name](), "run `make docs`"


def test_every_table_between_marks_is_written_by_something() -> None:
    closed = set(re.findall(r"^<!-- /([\w-]+) -->$", text(), flags=re.MULTILINE))
    by_others = {"compatibility", "vllm-versions"}  # `make compatibility`
    measured = evaluation.BLOCKS.keys() | evaluation.CLIP_BLOCKS.keys() | {evaluation.AT_64}
    assert closed == BLOCKS.keys() | measured | by_others


def test_the_pages_show_what_an_evaluation_measured(tmp_path: Path) -> None:
    copies = [Path(shutil.copy(page, tmp_path)) for page in BUILT]
    assert not evaluation.copy_plots(tmp_path, tmp_path)
    ways = ((method, budget) for method in evaluation.README_METHODS for budget in ("64", "32"))
    pruned = [
        answers(*way, lambda seed, _: seed > 0, confidence=lambda seed, _: seed / 10, images=9) for way in ways
    ]
    with Log(tmp_path / FILE, {**records().settings, "confidence_tokens": 16}, RUN) as log:
        for answer in (
            *answers("full", "full", lambda *_: True, images=9),
            *(each for few in pruned for each in few),
        ):
            log.add(answer)
    changed = replace(copies, evaluation.render(tmp_path))
    assert {page.name for page in changed} == {"README.md", "evaluation.md", "results.md"}
    readme = (tmp_path / "README.md").read_text()
    assert "| `uniform` | 18 | -11.1 ± 11.1 | -11.1 ± 11.1 |" in readme
    assert "First try 64 with `promprune`, " in (tmp_path / "evaluation.md").read_text()
    assert evaluation.render(tmp_path, ["checks"]).keys() == {"checks"}
    with pytest.raises(EvaluationError, match="There is no block cheques"):
        evaluation.render(tmp_path, ["cheques"])


def test_the_methods_that_read_nothing_of_the_tower_are_named() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    first = page.partition("## Methods that read nothing of the tower")[2].partition(" take nothing from ")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in table("methods").splitlines()]
    free = {row[1] for row in rows if row[4] == "**no**"}
    assert free == set(re.findall(r"`[\w-]+`", first))
    assert {"`divprune`", "`random`"} < free


def test_building_the_documents_mends_what_is_out_of_date(tmp_path: Path) -> None:
    copies = [Path(shutil.copy(page, tmp_path)) for page in BUILT]
    assert write(copies) == []
    (metrics,) = [page for page in copies if page.name == "metrics.md"]
    right = metrics.read_text()
    metrics.write_text(right.replace("| label | ", "| labels | "))
    assert write(copies) == [metrics]
    assert metrics.read_text() == right
    with pytest.raises(ValueError, match="must occur once, but occur 2 times"):
        write([*copies, Path(shutil.copy(metrics, tmp_path / "twice.md"))])


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120


def test_there_are_few_pages() -> None:
    assert len(list((ROOT / "docs").glob("*.md"))) <= 11


def test_no_two_pages_say_the_same() -> None:
    said = {page.name: passages(page) for page in PAGES}
    assert min(map(len, said.values())) > 0
    twice = {f"{one}, {other}: {each}" for one, other in combinations(said, 2) for each in said[one] & said[other]}
    assert sorted(twice) == []


def test_the_readmes_losses_are_those_of_the_evaluation() -> None:
    """The README shows some of the rows."""
    everything = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| `[\w-]+` \| [\d,]+ \|.*$", README.read_text(), flags=re.MULTILINE)
    assert len(rows) > 4
    assert all(row in everything for row in rows)


def test_every_example_is_run_or_says_what_it_needs() -> None:
    run = {name for file in TESTS for name in re.findall(r'example\("([\w-]+)"\)', file.read_text())}
    for page in PAGES:
        for mark, value, language, code in BLOCK.findall(page.read_text()):
            if language not in ("sh", "python"):
                continue  # output, or a body that is sent
            assert mark, f"{page.name}: no mark says how this is tested: {code[:80]!r}"
            if mark == "run":
                assert value in run, f"{page.name}: no test runs {value}"
            if mark == "from":
                source = (ROOT / value).read_text()
                assert all(line in source for line in code.splitlines()), f"{page.name} shows {value} as it was"


def test_no_command_that_we_show_or_print_needs_gnu_base64() -> None:
    """On macOS, ``base64`` has no option ``-w``."""
    shown = [*PAGES, *(ROOT / "CHANGELOG.md", ROOT / "Makefile")]
    for folder in ("deploy", "docker", "docs", "promprune_vllm"):
        shown += [file for file in (ROOT / folder).rglob("*") if file.suffix in TEXTS and file.is_file()]
    assert len(shown) > 150
    assert [str(file) for file in shown if "base64 -w" in file.read_text()] == []


def test_the_example_of_the_library_selects() -> None:
    generator = torch.Generator().manual_seed(0)
    found = {
        "tokens": torch.randn(576, 8, generator=generator),
        "cls_attention": torch.rand(576, generator=generator),
    }
    exec(example("library"), found)
    assert len(found["kept"]) == 64


def test_the_example_of_a_plan_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(TRAINED / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    program, *arguments = example("plan").split()
    assert program == "promprune"
    run = CliRunner().invoke(app, arguments)  # in process: a new one would spend 5 s on importing transformers
    assert run.exit_code == 0, run.output
    assert [row["budget"] for row in json.loads(run.stdout)["budgets"]] == ["full", "25%", "128"]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub makes from a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_figure_has_a_command_whose_dependencies_exist() -> None:
    assert len(find_figures()) > 8
    assert {figures.kind for figures in find_figures()} <= set(DEPENDS_ON)
    assert kind_of("OMP_NUM_THREADS=1 promprune bench prefill --layers 1") == "bench prefill"
    assert kind_of("promprune eval --clips 8 --out eval-clips") == "eval --clips"
    for pattern in {each for kind in DEPENDS_ON for each in patterns(kind)}:
        assert list(ROOT.glob(pattern.removeprefix(":!"))), pattern


def test_figures_are_younger_than_what_they_measure() -> None:
    """``git log COMMIT..HEAD`` of the files that a figure depends on; ``tests/figures.py`` has them."""
    if git("rev-parse", "HEAD") is None:
        pytest.skip("no git checkout: nobody can tell what has changed since")
    if not has_all_commits():
        pytest.skip("a shallow clone: the commits of figures are not in it")
    found = {figures.name for figures in find_figures() if is_out_of_date(figures)}
    assert found - OUT_OF_DATE.keys() == set(), "measure anew, or add it to OUT_OF_DATE with the reason"
    assert OUT_OF_DATE.keys() - found == set(), "no longer out of date: remove it from OUT_OF_DATE"
