"""The table of methods, with how often each agrees with its authors' own code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from promprune_vllm.commands.methods import PRUNES
from promprune_vllm.markdown import table

AGREEMENT = Path(__file__).parents[2] / "tests" / "golden" / "agreement.json"
"""Written by ``python -m tests.golden.measure``."""

UNSERVABLE = {
    "fastv": (
        "arXiv 2403.06764",
        "Not served: it prunes after layer 2 of the decoder, when the KV blocks that a serving engine wants to "
        "save are allocated for all N tokens.",
    ),
    "sparsevlm": (
        "arXiv 2410.04417",
        "Not served: it prunes at layers 2, 6 and 15 of the decoder, also after the KV blocks of all N tokens are "
        "allocated.",
    ),
}
"""Published methods that need the decoder's attention maps: name -> paper, and why they cannot be supported."""

_COLUMNS = (
    "method",
    "paper",
    "needs",
    "reads the tower",
    "prunes",
    "what it does",
    "merges or drops",
    "golden agreement",
)
_ABSENT = "-"


def markdown(methods: Iterable[Mapping[str, Any]]) -> str:
    """Render the table.

    Args:
        methods: What ``promprune methods --json`` prints.
    """
    measured: Mapping[str, Any] = json.loads(AGREEMENT.read_text(encoding="utf-8"))
    rows: list[tuple[str, ...]] = [
        (
            f"`{row['name']}`",
            _linked(row["paper"]),
            ", ".join(row["needs"]),
            "yes" if row["reads_tower"] else "**no**",
            PRUNES[row["over_frames"]],
            row["summary"],
            "merges" if row["merges"] else "drops",
            _agreement(measured.get(row["name"])),
        )
        for row in methods
    ]
    rows += [
        (name, _linked(paper), *[_ABSENT] * 3, why, _ABSENT, _ABSENT) for name, (paper, why) in UNSERVABLE.items()
    ]
    return table(_COLUMNS, rows)


def _linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5}(?:v\d+)?)", r"[\1](https://arxiv.org/abs/\1)", paper)


def _agreement(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return _ABSENT
    return f"{measured['equal']}/{measured['total']} sets equal ({measured['against']})"
