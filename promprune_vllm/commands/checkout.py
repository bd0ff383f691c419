"""Imports code that only a checkout of the repository has: the document builder and the demo model's training."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from promprune_vllm.commands.failures import fail

ROOT = Path(__file__).parents[2]


def import_from_checkout(module: str, command: str) -> ModuleType:
    """Import a module below ``deploy/``, or exit and say where to find it, since the wheel does not include it.

    Args:
        module: Its name, such as ``deploy.documents.methods``.
        command: The ``promprune`` command that needs it, for the message.
    """
    folder = "/".join(module.split(".")[:2])
    if not (ROOT / folder).is_dir():
        fail(
            f"`promprune {command}` needs {folder}, which is in a checkout of the repository but not in the "
            f"installed package. In a checkout, run `make setup` and then `.venv/bin/promprune {command}`."
        )
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module(module)
