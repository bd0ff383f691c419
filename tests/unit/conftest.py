"""Unit tests are small, and so are their tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from promprune_vllm.demo.threads import torch_threads


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Share no tensor of a few hundred rows among threads: waking them takes longer than the sum itself."""
    with torch_threads(1):
        yield
