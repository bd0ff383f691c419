"""One published method, one file. A file that registers a selector here is found by every reader."""

import sys
from collections.abc import Mapping
from types import ModuleType


class _Methods(ModuleType):
    # Importing this folder binds its name on the parent package, where `methods()` is public API. Being
    # callable, the module serves as both, in whatever order the two are imported.
    def __call__(self) -> Mapping[str, type]:
        from promprune_vllm.core.registry import methods

        return methods()


sys.modules[__name__].__class__ = _Methods
