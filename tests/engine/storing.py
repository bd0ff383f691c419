"""The feature cache on an engine that was started without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from promprune_vllm.engine.worker.feature_store import FeatureStore
from tests.engine.conftest import Engine


@contextmanager
def storing(engine: Engine, capacity_bytes: int = 1 << 28) -> Iterator[FeatureStore]:
    """Give an engine an empty store inside the block."""
    processor: Any = engine.llm.llm_engine.input_processor.renderer.mm_processor
    store = FeatureStore(capacity_bytes)
    engine.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model, "_store", store)
        patch.setattr(processor, "_settings", processor._settings.model_copy(update={"feature_cache_gb": 1.0}))
        yield store
        if hasattr(engine, "llm"):  # it is closed after a failure
            engine.forget()  # vLLM's processor cache has images with identities


def evict(engine: Engine) -> None:
    """Empty every cache of vLLM's, as other requests would in time; the store stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model, "forget_images", lambda: None)
        engine.forget()
