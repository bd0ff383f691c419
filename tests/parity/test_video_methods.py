"""The methods for videos against vLLM's own pruning of videos: the same embeddings, the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.multimodal.video_prune import evs, vidcom2

from promprune_vllm import VisionFeatures, select
from promprune_vllm.methods.vidcom2 import likeness
from tests.video_features import KINDS, clip

SHAPES = [(2, 3, 4, 33), (5, 4, 7, 96), (9, 6, 5, 1280)]
TYPES = [torch.float32, torch.bfloat16]
RATES = (0.1, 0.25, 0.47, 0.5, 0.6, 0.75, 0.8, 0.9, 0.99)

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)


def kept_by_vllm(method: ModuleType, features: VisionFeatures, rate: float) -> Tensor:
    mask: Tensor = method.compute_retention_mask(features.projected, features.grid, 1, rate)
    return mask.nonzero().squeeze(1)


def count_of_vllm(method: ModuleType, features: VisionFeatures, rate: float) -> int:
    frames, rows, columns = features.grid
    return int(method.compute_retained_tokens_count(rows * columns, frames, rate))


def budgets(features: VisionFeatures, least: int) -> Iterator[tuple[int, float]]:
    """Numbers of tokens, and the rate at which vLLM keeps as many: a trifle less, since it rounds down."""
    n = features.tokens
    for keep in sorted({least, least + 1, *range(least, n, max(1, n // 13)), n - 1}):
        yield keep, 1 - (keep + 1e-9) / n


@contextmanager
def first_of_equals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, vLLM's choice of tokens among equals is ours: the first of them are kept.

    Its choice of columns is left alone: that one is the same operation in both.
    """
    topk = torch.topk

    def ordered(values: Tensor, k: int, **options: Any) -> Any:
        if options.get("sorted", True):
            return topk(values, k, **options)
        order = values.argsort(stable=True)
        chosen = order.flip(0)[:k] if options["largest"] else order[:k]
        return values[chosen], chosen

    with monkeypatch.context() as patch:
        patch.setattr(torch, "topk", ordered)
        yield


@each_shape
@each_type
@each_kind
def test_evs_keeps_vllms_tokens_at_any_rate(
    kind: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    features = clip(kind, shape, dtype)
    _, rows, columns = features.grid
    for keep, rate in [
        *((count_of_vllm(evs, features, rate), rate) for rate in RATES),
        *budgets(features, rows * columns),
    ]:
        expected = kept_by_vllm(evs, features, rate)
        assert len(expected) == keep
        assert torch.equal(select(features, keep, "evs").indices, expected)


@each_shape
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "static"])
def test_vidcom2_keeps_vllms_tokens_where_none_are_equal(kind: str, shape: tuple[int, int, int, int]) -> None:
    features = clip(kind, shape, torch.float32)
    for keep, rate in budgets(features, features.grid[0]):
        expected = kept_by_vllm(vidcom2, features, rate)
        assert len(expected) == keep
        assert torch.equal(select(features, keep, "vidcom2").indices, expected)


@each_shape
@each_type
@each_kind
def test_vidcom2_differs_from_vllm_only_in_which_of_equal_tokens_it_keeps(
    kind: str, dtype: torch.dtype, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    features = clip(kind, shape, dtype)
    redundancy = sum(likeness(features)).flatten()  # type: ignore[union-attr]
    for keep, rate in budgets(features, features.grid[0]):
        ours, theirs = select(features, keep, "vidcom2").indices, kept_by_vllm(vidcom2, features, rate)
        assert torch.equal(redundancy[ours].sort().values, redundancy[theirs].sort().values)
        with first_of_equals(monkeypatch):
            assert torch.equal(ours, kept_by_vllm(vidcom2, features, rate))


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
@each_type
def test_vidcom2_keeps_vllms_tokens_at_a_rate_that_leaves_a_whole_number(
    rate: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = clip("event", (8, 4, 6, 96), dtype)
    keep = count_of_vllm(vidcom2, features, rate)
    with first_of_equals(monkeypatch):
        expected = kept_by_vllm(vidcom2, features, rate)
    assert torch.equal(select(features, keep, "vidcom2").indices, expected)


def test_like_vllm_vidcom2_can_take_the_only_token_of_a_frame() -> None:
    """One frame is unlike the rest, and its quota rounds up to two tokens of as many as there are frames."""
    features = clip("event", (5, 4, 7, 96), torch.float32)
    rate = 1 - 5 / features.tokens
    for indices in (kept_by_vllm(vidcom2, features, rate), select(features, 5, "vidcom2").indices):
        assert (indices // 28).bincount(minlength=5).tolist().count(0) == 1
