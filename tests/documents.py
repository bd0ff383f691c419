"""The documents: README, docs/ and their neighbours, with their examples and generated tables."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))

BLOCK = re.compile(r"(?:<!-- (run|from|needs): (.*?) -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""A block of code: the kind of its mark, the mark's value, the language, the code."""


def text() -> str:
    """The text of all pages, one after the other."""
    return "\n".join(page.read_text() for page in PAGES)


def example(name: str) -> str:
    """The code block after ``<!-- run: name -->``, on any page."""
    found = re.search(rf"<!-- run: {name} -->\n```\w+\n(.*?)```", text(), flags=re.DOTALL)
    assert found, f"no page has an example {name}"
    return found.group(1)


def examples(page: Path) -> list[str]:
    """The names of a page's examples that tests run, from top to bottom."""
    return [value for mark, value, *_ in BLOCK.findall(page.read_text()) if mark == "run"]


def table(name: str) -> str:
    """The text between ``<!-- name -->`` and ``<!-- /name -->``, which one page has."""
    found = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text(), flags=re.DOTALL)
    assert len(found) == 1, f"{len(found)} pages have a table {name}"
    return str(found[0])


def prose(page: Path) -> str:
    """The text of a page without code and generated blocks; links are their words."""
    left = re.sub(r"^<!-- ([\w-]+) -->\n.*?^<!-- /\1 -->", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    left = re.sub(r"^```.*?^```", "", left, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", left)


def passages(page: Path) -> set[str]:
    """What a reader would know again: paragraphs, list items and cells of 120 characters, and sentences of 90."""
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.) )|\|", prose(page))
    blocks = [re.sub(r"^(?:[-*]|\d+\.) ", "", " ".join(part.split())) for part in parts]
    sentences = [each for block in blocks for each in re.split(r"(?<=[.!?:;]) ", block)]
    return {each for each in blocks if len(each) >= 120} | {each for each in sentences if len(each) >= 90}
