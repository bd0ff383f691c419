"""What of other programs runs our code: found by looking at every module, not by asking the list of patches."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import promprune_vllm
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.patches import PATCHES
from tests import runner

HOSTS = ("vllm", "transformers", "fastapi", "starlette", "prometheus_client", "importlib")
WORKER = (Stage.WORKER, Stage.WORKER_V2 if runner.is_v2() else Stage.WORKER_V1, Stage.WORKER_CPU)
"""Stages of a worker on the runner that the tests run on."""
_PACKAGE = str(Path(promprune_vllm.__file__).parent)


def targets(loaded: Collection[str], *stages: Stage) -> set[str]:
    """Return what is patched by the list where these modules are loaded and these stages were reached."""
    return {
        patch.target
        for patch in PATCHES
        if patch.stage in stages and (patch.module in loaded if patch.only_if_loaded else patch.applies)
    }


def patched() -> set[str]:
    """Return the functions and methods of ``HOSTS`` that this process has ours in the place of."""
    found: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module is not None and module_name.split(".")[0] in HOSTS:
            for path, value in _members(module_name, module):
                if _is_ours(value):
                    found[f"{module_name}:{path}"] = value
    # Another module may have imported by name what is patched where it was defined.
    at_home = {id(value) for where, value in found.items() if _home(value) == where}
    return {where for where, value in found.items() if _home(value) == where or id(value) not in at_home}


def _members(module_name: str, module: Any) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(module).items()):
        if isinstance(value, type):
            if value.__module__ == module_name and value.__name__ == name:
                yield from ((f"{name}.{attribute}", each) for attribute, each in list(vars(value).items()))
        else:
            yield name, value


def _is_ours(value: Any) -> bool:
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, classmethod | staticmethod):
        value = value.__func__
    return isinstance(value, FunctionType) and value.__code__.co_filename.startswith(_PACKAGE)


def _home(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
