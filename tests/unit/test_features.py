"""``VisionFeatures``: what it refuses, and taking and joining tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promprune_vllm import Need, VisionFeatures

PER_TOKEN = ("projected", "saliency", "encoder", "keys")


def full(n: int, seed: int = 0, **more: Any) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values = {"projected": draw(n, 6), "saliency": draw(n), "encoder": draw(n, 9), "keys": draw(n, 3)}
    return VisionFeatures(**{"grid": (1, 1, n), "text": draw(2, 6), **values, **more})


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"projected": torch.ones(12)}, "projected must be"),
        ({"projected": torch.ones(0, 6)}, "with N >= 1"),
        ({"projected": torch.ones(12, 6, dtype=torch.int64)}, "floating point"),
        ({"grid": (1, 3, 5)}, "holds 15 tokens"),
        ({"saliency": torch.ones(11)}, "saliency must be"),
        ({"saliency": torch.ones(12, 1)}, "saliency must be"),
        ({"encoder": torch.ones(11, 9)}, "encoder must be"),
        ({"keys": torch.ones(12)}, "keys must be"),
        ({"text": torch.ones(2, 5)}, "text must be"),
        ({"entropy": torch.ones(1)}, "a single number"),
        ({"entropy": torch.ones(12)}, "a single number"),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        full(12, **wrong)


def test_an_entropy_is_a_single_number_and_no_need() -> None:
    given_one = full(12, entropy=torch.tensor(0.5))
    assert given_one.entropy == 0.5
    assert given_one.has == Need.PROJECTED | Need.ENCODER | Need.KEYS | Need.SALIENCY | Need.TEXT
    assert VisionFeatures(torch.ones(2, 3), (1, 1, 2)).has == Need.PROJECTED


@given(st.integers(1, 30), st.data())
def test_taking_tokens_takes_all_that_belongs_to_them(n: int, data: st.DataObject) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    features = full(n, entropy=torch.tensor(0.25))
    taken = features.take(torch.tensor(chosen), (1, len(chosen), 1))
    assert taken.grid == (1, len(chosen), 1)
    for name in PER_TOKEN:
        assert torch.equal(getattr(taken, name), getattr(features, name)[chosen])
    assert taken.text is features.text
    assert taken.entropy is features.entropy


def test_taking_tokens_checks_their_grid_and_leaves_absent_what_is_absent() -> None:
    bare = VisionFeatures(projected=torch.arange(8.0).view(4, 2), grid=(1, 2, 2))
    taken = bare.take(torch.tensor([1, 3]), (1, 1, 2))
    assert taken.has == Need.PROJECTED
    assert taken.projected.tolist() == [[2, 3], [6, 7]]
    with pytest.raises(ValueError, match="holds 3 tokens"):
        bare.take(torch.tensor([1, 3]), (1, 1, 3))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_joined_tokens_stand_one_after_the_other(sizes: list[int]) -> None:
    groups = [full(n, seed=i) for i, n in enumerate(sizes)]
    joined = VisionFeatures.join(groups)
    assert joined.grid == (1, 1, sum(sizes))
    start = 0
    for group in groups:
        part = joined.take(torch.arange(start, start + group.tokens), group.grid)
        for name in PER_TOKEN:
            assert torch.equal(getattr(part, name), getattr(group, name))
        start += group.tokens


def test_joining_keeps_absent_what_is_absent() -> None:
    bare = VisionFeatures(projected=torch.ones(2, 3), grid=(1, 1, 2))
    assert VisionFeatures.join([bare, bare]).has == Need.PROJECTED
