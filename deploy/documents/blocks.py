"""The generated blocks: what is between ``<!-- name -->`` and ``<!-- /name -->`` on a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy.documents import methods, options, patches, routes
from promprune_vllm.commands import families, metrics
from promprune_vllm.commands.methods import describe
from promprune_vllm.evaluation import lmms

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

BLOCKS: Mapping[str, Callable[[], str]] = {
    "methods": lambda: methods.markdown(describe()),
    "families": families.markdown,
    "metrics": metrics.markdown,
    "options": options.markdown,
    "routes": routes.markdown,
    "patches": patches.markdown,
    "reasons": patches.reasons_markdown,
    "writes": patches.writes_markdown,
    "lmms": lambda: lmms.table([]),
}
"""Name -> what renders it. Tables of measurements are written by what measures them: `make compatibility`."""


def write(pages: Sequence[Path]) -> list[Path]:
    """Write every block into the page that has its marks.

    Returns:
        The pages that changed.

    Raises:
        ValueError: Not exactly one page has the marks of a block.
    """
    before = {page: page.read_text(encoding="utf-8") for page in pages}
    after = dict(before)
    for name, render in BLOCKS.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        found = [page for page, text in after.items() for _ in marks.finditer(text)]
        if len(found) != 1:
            raise ValueError(
                f"the marks <!-- {name} --> and <!-- /{name} --> are there {len(found)} times, not once"
            )
        (page,) = found
        start, opening, closing, end = marks.split(after[page])
        after[page] = f"{start}{opening}{render()}{closing}{end}"
    changed = [page for page in pages if after[page] != before[page]]
    for page in changed:
        page.write_text(after[page], encoding="utf-8")
    return changed
