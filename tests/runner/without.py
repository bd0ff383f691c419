"""A pytest plugin for tests of tests: one thing that the product does with vLLM is left out.

``PROMPRUNE_TEST_WITHOUT`` has the target of a row of the patches, or ``"module:function"`` of ours that then does
nothing.
"""

from __future__ import annotations

import importlib
import os

VARIABLE = "PROMPRUNE_TEST_WITHOUT"


def pytest_configure() -> None:
    name = os.environ[VARIABLE]
    from promprune_vllm.engine import patches  # not before the runner is chosen

    kept = tuple(patch for patch in patches.PATCHES if patch.target != name)
    if len(kept) < len(patches.PATCHES):
        patches.PATCHES = kept
        return
    module, _, function = name.partition(":")
    owner = importlib.import_module(module)
    assert callable(getattr(owner, function)), f"{name} is neither a row nor a function"
    setattr(owner, function, lambda *_: None)
