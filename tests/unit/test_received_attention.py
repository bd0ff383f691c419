"""The attention a patch receives, against a whole attention map in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from promprune_vllm.kernels import torch_ops
from promprune_vllm.kernels.torch_ops import received_attention

SHAPES = [(1, 1, 4), (2, 3, 8), (17, 2, 16), (64, 4, 5), (129, 1, 80), (300, 5, 32)]  # P, H, d


def drawn(patches: int, heads: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (2 * torch.randn(patches, heads, d, generator=generator) for _ in range(2))
    return queries, keys


def dense(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    scores = scale * torch.einsum("ihd,jhd->hij", queries.double(), keys.double())
    return scores.softmax(dim=-1).mean(dim=(0, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_column_mean_of_the_whole_map(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    queries, keys = (x.to(dtype) for x in drawn(*shape))
    scale = shape[2] ** -0.5
    received = received_attention(queries, keys, scale)
    assert received.dtype == torch.float32
    assert received.shape == (shape[0],)
    truth = dense(queries, keys, scale)
    torch.testing.assert_close(received.double(), truth, rtol=2e-5, atol=1e-9)
    assert float(received.double().sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 18])
def test_it_does_not_depend_on_how_many_rows_are_held_at_a_time(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    patches, heads, d = 17, 2, 16
    queries, keys = drawn(patches, heads, d)
    truth = dense(queries, keys, 0.25)
    for scores in (rows * heads * patches, (rows + 1) * heads * patches - 1):
        monkeypatch.setattr(torch_ops, "ATTENTION_SCORES", scores)
        torch.testing.assert_close(received_attention(queries, keys, 0.25).double(), truth, rtol=2e-5, atol=1e-9)


def test_a_map_with_rows_larger_than_the_memory_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ops, "ATTENTION_SCORES", 1)
    sizes: list[int] = []
    split = torch.split
    monkeypatch.setattr(torch, "split", lambda tensor, size: sizes.append(size) or split(tensor, size))
    queries, keys = drawn(9, 3, 4)
    received = received_attention(queries, keys, 0.5)
    assert sizes == [1]
    torch.testing.assert_close(received.double(), dense(queries, keys, 0.5), rtol=2e-5, atol=1e-9)


def test_a_patch_whose_key_every_query_asks_for_gets_everything() -> None:
    queries = torch.ones(6, 2, 4)
    keys = torch.zeros(6, 2, 4)
    keys[3] = 1e4  # scores far beyond what exp() holds
    assert received_attention(queries, keys, 1.0).tolist() == [0, 0, 0, 1, 0, 0]


def test_equal_keys_share_equally_and_equal_patches_get_the_same() -> None:
    queries, keys = drawn(10, 2, 8)
    even = received_attention(queries, keys[:1].expand(10, -1, -1), 0.3)
    torch.testing.assert_close(even, torch.full((10,), 0.1))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    moved = received_attention(queries[order], keys[order], 0.3)
    torch.testing.assert_close(moved, received_attention(queries, keys, 0.3)[order])
