"""One file per published method. A file that registers a selector here makes it available everywhere."""

import sys
from collections.abc import Mapping
from types import ModuleType


class _Methods(ModuleType):
    # Importing this package sets `promprune_vllm.methods`, where `methods()` is public API. A callable module
    # serves as both, whichever is imported first.
    def __call__(self, *, over_frames: bool | None = None) -> Mapping[str, type]:
        from promprune_vllm.core.registry import methods

        return methods(over_frames=over_frames)


sys.modules[__name__].__class__ = _Methods
