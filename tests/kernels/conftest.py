"""The kernels of the CUDA path need Triton, and vLLM for CPU behaves differently where it finds one.

So Triton is not in the environment of the suite but in a folder of its own (`make test` fills it), and
`test_interpreter.py` runs this folder again in a process that sees it, on CPU tensors, in Triton's interpreter. In
an environment that has Triton anyway, one with a GPU, everything here runs directly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from typing import Any

import pytest
import torch

# Asked of the path alone: vLLM's tests on Model Runner V2 may have imported a Triton of their own (tests/runner).
HAS_TRITON = PathFinder.find_spec("triton") is not None
collect_ignore = [] if HAS_TRITON else ["test_triton.py", "test_no_sync.py", "test_compiled.py"]

if HAS_TRITON and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> Iterator[None]:
    """Let the interpreter prepare a function once per launch, not at every call of it, a millisecond each.

    Three quarters of the time of these tests, and nothing that they test.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    prepared: set[Any] = set()
    launch, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launched(self: Any, *arguments: Any, **keywords: Any) -> Any:
        prepared.clear()
        return launch(self, *arguments, **keywords)

    def called(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.fn not in prepared:
            prepared.add(self.fn)
            prepare(self.fn)
        return self.rewrite()(*arguments, **keywords)

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter.GridExecutor, "__call__", launched)
    patch.setattr(interpreter.InterpretedFunction, "__call__", called)
    yield
    patch.undo()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Few large tiles: the interpreter's time goes by operations more than by numbers. GPUs keep their own tiles.

    Returns:
        Sets the tiles that suit a number of rows; at first 64.
    """
    from promprune_vllm.kernels import triton_attention, triton_gram, triton_greedy

    def suit(rows: int) -> None:
        if not torch.cuda.is_available():
            tile = next(size for size in (16, 64, 128, 256, 512) if size >= rows or size == 512)
            monkeypatch.setattr(triton_gram, "TILES", (tile, tile))
            monkeypatch.setattr(triton_gram, "CHUNK", 256)
            monkeypatch.setattr(triton_gram, "CHAIN_CHUNK", tile)
            monkeypatch.setattr(triton_greedy, "TILE", 1024)
            monkeypatch.setattr(triton_attention, "BLOCKS", {2: 256, 4: 256})

    suit(64)
    return suit
