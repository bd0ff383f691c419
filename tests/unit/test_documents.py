"""What documents say of the code is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import PAGES, README, ROOT


def test_every_test_that_the_security_notes_name_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text()))
    there = {
        name for file in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(named) > 15
    assert named - there == set()


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 250


def test_the_readmes_losses_are_those_of_the_evaluation() -> None:
    """It shows some of the rows."""
    everything = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| `[\w-]+` \| [\d,]+ \|.*$", README.read_text(), flags=re.MULTILINE)
    assert len(rows) > 4
    assert all(row in everything for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
