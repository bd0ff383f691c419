"""What only a checkout of the repository has: the builder of its documents, the training of the demo model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from promprune_vllm.commands.failures import fail

ROOT = Path(__file__).parents[2]


def import_from_checkout(module: str, command: str) -> ModuleType:
    """Import a module below ``deploy/``, or exit with where it is, since no wheel carries it.

    Args:
        module: Its name, such as ``deploy.documents.methods``.
        command: What needs it, as given to ``promprune``, for the message.
    """
    folder = "/".join(module.split(".")[:2])
    if not (ROOT / folder).is_dir():
        fail(
            f"`promprune {command}` needs {folder}, which is in a checkout of the repository and not in the "
            f"installed package. In a checkout, run `make setup` and then `.venv/bin/promprune {command}`."
        )
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module(module)
