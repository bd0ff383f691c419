"""The generated blocks of pages, between the marks ``<!-- name -->`` and ``<!-- /name -->``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy.documents import gpu, methods, options, patches, routes, seams
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
    "parts": seams.markdown,
    "writes": patches.writes_markdown,
    "lmms": lambda: lmms.table([]),
    "published": lmms.published_table,
    "gpu": gpu.summary_markdown,
    "gpu-tests": gpu.kernel_tests_markdown,
    "gpu-kernels": gpu.kernels_markdown,
    "gpu-prefill": gpu.prefill_markdown,
    "gpu-vllm": gpu.vllm_markdown,
    "gpu-coverage": gpu.coverage_markdown,
}
"""Name -> function that renders the block. Tables of measurements are written by the measurement itself, such as
`make compatibility`, or shown by `make docs ARGS="--eval DIR"`; those on GPUs are kept in docs/gpu.json, since
they come from other machines."""


def write(pages: Sequence[Path]) -> list[Path]:
    """Write every block into the page with its marks.

    Returns:
        The pages that changed.

    Raises:
        ValueError: The marks of a block do not occur exactly once.
    """
    return replace(pages, {name: render() for name, render in BLOCKS.items()})


def replace(pages: Sequence[Path], blocks: Mapping[str, str]) -> list[Path]:
    """Replace blocks, given by the names of their marks; see ``write``."""
    before = {page: page.read_text(encoding="utf-8") for page in pages}
    after = dict(before)
    for name, block in blocks.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        matches = [page for page, text in after.items() for _ in marks.finditer(text)]
        if len(matches) != 1:
            raise ValueError(
                f"the marks <!-- {name} --> and <!-- /{name} --> must occur once, but occur {len(matches)} times"
            )
        (page,) = matches
        start, opening, closing, end = marks.split(after[page])
        after[page] = f"{start}{opening}{block}{closing}{end}"
    changed = [page for page in pages if after[page] != before[page]]
    for page in changed:
        page.write_text(after[page], encoding="utf-8")
    return changed
