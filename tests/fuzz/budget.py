"""Bytes a client may send, guided by coverage: `python tests/fuzz/budget.py -runs=200000`.

Whatever JSON makes of them is refused with a sentence of bounded length, or is a budget that keeps what it says.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["promprune_vllm"]):
    from promprune_vllm.core import budget, policy
    from promprune_vllm.server import schemas

from pydantic import ValidationError

from promprune_vllm.errors import BudgetError

MEDIA = (
    policy.Medium(budget.IMAGE, 576),
    policy.Medium(budget.VIDEO, 1, frames=1),
    policy.Medium(budget.VIDEO, 16_384, frames=64),
)
_LONGEST_SENTENCE = 1500
_SEEDS = (b"64", b"0.25", b'"25%"', b'"full"', b'[64, "auto", 0.5]', b'{"total": 256}', b"1e999", b'"\\u0662%"')
_SEEDS += (b'{"per_frame": 32}', b'["auto", {"per_frame": "1"}, 8.0]')
_SEEDS += (b'{"images": [{"width": 640, "height": 480}], "visual_token_budget": [1], "detail": ["low"]}',)


def one(data: bytes) -> None:
    """Read bytes as the server reads a request's field, and as it reads a request to count."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    _budget(value)
    with suppress(ValidationError):
        schemas.CountRequest.model_validate(value)


def _budget(value: object) -> None:
    try:
        ask = budget.BudgetRequest.parse(value)
        kept = policy.MediaPolicy().resolve_all(ask, MEDIA)
    except BudgetError as error:
        if len(str(error)) > _LONGEST_SENTENCE:
            raise AssertionError(f"a sentence of {len(str(error))} characters") from error
        return
    if not all(1 <= keep <= each.total for keep, each in zip(kept, MEDIA, strict=True)):
        raise AssertionError(f"{value!r} keeps {kept} of {MEDIA}")
    if budget.BudgetRequest.parse(ask.printed()) != ask:
        raise AssertionError(f"{value!r} is printed as {ask.printed()!r}, which is another budget")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(_SEEDS):
            Path(corpus, str(i)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], one)
        atheris.Fuzz()
