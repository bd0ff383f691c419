"""The tool that finds waits: what it notices, and what it lets pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.waits import EIGENVALUES, GPU, NoWaits, Wait, to_gpu

NO_VALUES = (RuntimeError, NotImplementedError)  # of tensors on meta


@pytest.mark.parametrize(
    "act",
    [
        lambda x, host: host.to(GPU),
        lambda x, host: x.copy_(host),
        lambda x, host: x[host],
        lambda x, host: x.cpu(),
        lambda x, host: x.tolist(),
        lambda x, host: x.index_put_((x > 0,), x[:2]),
        lambda x, host: torch.tensor([1], device=GPU),
        lambda x, host: torch.as_tensor([1], device=GPU),
        lambda x, host: x.new_tensor([1]),
        lambda x, host: torch.linalg.eigh(x.outer(x)),
        lambda x, host: torch.linalg.svdvals(x.outer(x)),
    ],
)
def test_a_wait_is_noticed(act: Callable[[Tensor, Tensor], object]) -> None:
    host = torch.arange(4)
    x = to_gpu(host.float())
    with NoWaits(), pytest.raises(Wait):
        act(x, host)


def test_it_sees_too_little_in_inference_mode() -> None:
    with torch.inference_mode():
        host = torch.arange(4)
    with NoWaits(), pytest.raises(AssertionError, match="inference_mode"):
        host.to(GPU)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.to("cpu", non_blocking=True).sum(),
    ],
)
def test_a_value_fails_by_itself(act: Callable[[Tensor], object]) -> None:
    with pytest.raises(NO_VALUES):
        act(to_gpu(torch.arange(4.0)))


def test_what_does_not_wait_passes() -> None:
    host = torch.arange(4)
    with NoWaits([EIGENVALUES]):
        there = host.to(GPU, non_blocking=True)
        values = there.double()[there] * 2.0 + torch.tensor(1.0)
        torch.linalg.eigh(values.outer(values))
        torch.linalg.eigh(torch.eye(2))
        values[values > 0] = 1  # torch fills instead of indexing
        assert host[host > 1].tolist() == [2, 3]
        assert values.masked_fill(values > 0, 0).argsort(stable=True).device == GPU
