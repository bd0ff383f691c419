"""The documents: README, docs/ and their neighbours, with their examples and generated tables."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))

BLOCK = re.compile(r"(?:<!-- (run|from|needs): (.*?) -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""A block of code: what its mark says and of what, the language, the code."""


def text() -> str:
    """All of them, one after the other."""
    return "\n".join(page.read_text() for page in PAGES)


def example(name: str) -> str:
    """The code block behind ``<!-- run: name -->``, of whichever page."""
    found = re.search(rf"<!-- run: {name} -->\n```\w+\n(.*?)```", text(), flags=re.DOTALL)
    assert found, f"no page has an example {name}"
    return found.group(1)


def examples(page: Path) -> list[str]:
    """The names of a page's examples that are run, from top to bottom."""
    return [value for mark, value, *_ in BLOCK.findall(page.read_text()) if mark == "run"]


def table(name: str) -> str:
    """What stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    found = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text(), flags=re.DOTALL)
    assert len(found) == 1, f"{len(found)} pages have a table {name}"
    return str(found[0])
