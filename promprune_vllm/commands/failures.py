"""How commands report failure: one line on stderr and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from promprune_vllm.errors import PromPruneError


def fail(message: str, status: int = 2) -> NoReturn:
    """Print one line on stderr and exit.

    Args:
        message: What is wrong, and what to do about it.
        status: Exit status of the process.
    """
    # Not `err=True`: vLLM 0.29 and 0.30 wrap stderr to prefix lines, and click mistakes that for a byte stream.
    typer.secho(f"promprune: {message}", file=sys.stderr, fg=typer.colors.RED)
    raise typer.Exit(code=status)


@contextmanager
def failing(status: int = 2) -> Iterator[None]:
    """Turn a ``PromPruneError`` in the block into one line on stderr and an exit status."""
    try:
        yield
    except PromPruneError as error:
        fail(str(error), status)


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Say, if the block is interrupted with Ctrl-C, how to resume from its folder."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho(f"promprune: interrupted; run the same command to resume from {out}.", err=True)
        raise typer.Exit(code=130) from None
