"""How commands report failure."""

from __future__ import annotations

import io
import sys

import pytest
import typer

from promprune_vllm.commands import failures
from promprune_vllm.errors import PromPruneError


class _Prefixed(io.TextIOWrapper):
    """Stderr as vLLM 0.29 and 0.30 leave it: writing nothing is no error, whatever its type."""

    def write(self, text: str) -> int:
        return super().write(f"(APIServer) {text}") if text else 0


def test_a_failure_is_told_through_the_stderr_that_vllm_puts_a_prefix_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", _Prefixed(written, encoding="utf-8"))
    with pytest.raises(typer.Exit) as ended, failures.failing(3):
        raise PromPruneError("What is wrong.")
    assert ended.value.exit_code == 3
    assert written.getvalue().decode() == "(APIServer) promprune: What is wrong.\n"
