"""Features, selection and the registry: edges, invariants, errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import promprune_vllm
from promprune_vllm import Need, Selection, VisionFeatures, get_method, methods, select, select_many
from promprune_vllm.core import registry
from promprune_vllm.errors import BudgetError, SettingsError, UnknownMethodError


def features(n: int = 12, d: int = 8, **more: torch.Tensor) -> VisionFeatures:
    generator = torch.Generator().manual_seed(n)
    projected = torch.randn(n, d, generator=generator)
    return VisionFeatures(projected=projected, grid=(1, 1, n), saliency=torch.rand(n, generator=generator), **more)


def test_public_names_are_all_there() -> None:
    for name in promprune_vllm.__all__:
        assert getattr(promprune_vllm, name) is not None
    assert set(promprune_vllm.__all__) <= set(dir(promprune_vllm))
    with pytest.raises(AttributeError):
        _ = promprune_vllm.no_such_name


def test_methods_is_callable_whatever_was_imported_first() -> None:
    import promprune_vllm.methods.promprune

    assert "promprune" in promprune_vllm.methods()
    assert {"promprune", "random", "uniform"} <= set(methods())


@pytest.mark.parametrize("keep", [12, 13, 10**6])
def test_keeping_everything_needs_no_method(keep: int) -> None:
    bare = VisionFeatures(projected=torch.ones(12, 8), grid=(1, 3, 4))
    assert select(bare, keep).indices.tolist() == list(range(12))


@pytest.mark.parametrize("keep", [0, -1, True, 2.0, "3", None])
def test_keep_must_be_a_positive_integer(keep: object) -> None:
    with pytest.raises(BudgetError, match="keep must be a positive integer"):
        select(features(), keep)  # type: ignore[arg-type]


def test_keep_may_be_any_integer_type() -> None:
    assert len(select(features(), np.int64(3)).indices) == 3  # type: ignore[arg-type]


def test_a_missing_need_is_named() -> None:
    bare = VisionFeatures(projected=torch.ones(12, 8), grid=(1, 3, 4))
    with pytest.raises(ValueError, match=r"'promprune' needs SALIENCY"):
        select(bare, 4)


def test_shapes_that_contradict_each_other_are_refused() -> None:
    x = torch.ones(12, 8)
    for wrong in (
        {"projected": torch.ones(12), "grid": (1, 3, 4)},
        {"projected": torch.ones(0, 8), "grid": (1, 0, 0)},
        {"projected": torch.ones(12, 8, dtype=torch.int64), "grid": (1, 3, 4)},
        {"projected": x, "grid": (1, 3, 5)},
        {"projected": x, "grid": (1, 3, 4), "saliency": torch.ones(11)},
        {"projected": x, "grid": (1, 3, 4), "encoder": torch.ones(11, 3)},
        {"projected": x, "grid": (1, 3, 4), "keys": torch.ones(12)},
        {"projected": x, "grid": (1, 3, 4), "text": torch.ones(2, 9)},
    ):
        with pytest.raises(ValueError, match=r"must be|holds"):
            VisionFeatures(**wrong)  # type: ignore[arg-type]


def test_unknown_methods_and_options_name_the_way_out() -> None:
    with pytest.raises(UnknownMethodError, match="Did you mean 'promprune'"):
        get_method("promprun")
    with pytest.raises(SettingsError, match=r"no option 'nu'.*mu, tau"):
        get_method("promprune", nu=1)
    with pytest.raises(SettingsError, match="refuses"):
        get_method("promprune", tau=0)
    with pytest.raises(SettingsError, match="already set up"):
        select(features(), 4, get_method("random"), seed=2)


@pytest.mark.parametrize(
    ("indices", "complaint"),
    [
        (torch.tensor([1, 1, 2]), "strictly increasing"),
        (torch.tensor([2, 1, 3]), "strictly increasing"),
        (torch.tensor([0, 1]), r"instead of int64 \(3,\)"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), "instead of int64"),
        (torch.tensor([0, 1, 12]), "outside 0"),
        (torch.tensor([-1, 1, 2]), "outside 0"),
    ],
)
def test_a_method_that_breaks_the_contract_is_caught(indices: torch.Tensor, complaint: str) -> None:
    @dataclass(frozen=True)
    class Broken:
        name: ClassVar[str] = "broken"
        needs: ClassVar[Need] = Need.PROJECTED
        paper: ClassVar[str] = "none"
        merges: ClassVar[bool] = False

        def select(self, features: VisionFeatures, keep: int) -> Selection:
            return Selection(indices)

    with pytest.raises(RuntimeError, match=complaint):
        select(features(), 3, Broken())


def test_several_groups_are_refused_as_one_is() -> None:
    group = features()
    with pytest.raises(BudgetError, match="keep must be a positive integer, got 0"):
        select_many([group, group], [3, 0])
    with pytest.raises(ValueError, match="2 groups need one number of tokens to keep each, got 1"):
        select_many([group, group], [3])
    assert select_many([], []) == []


def test_two_methods_cannot_share_a_name() -> None:
    @dataclass(frozen=True)
    class Impostor:
        name: ClassVar[str] = "promprune"

    methods()
    with pytest.raises(ValueError, match="two methods are named 'promprune'"):
        registry.register(Impostor)


def test_random_depends_on_content_and_seed_alone() -> None:
    image, other = features(100), features(101)
    first = select(image, 10, "random").indices
    assert torch.equal(first, select(features(100), 10, "random").indices)
    assert not torch.equal(first, select(image, 10, "random", seed=1).indices)
    assert not torch.equal(first, select(other, 10, "random").indices)
    counts = torch.zeros(100)
    for seed in range(300):
        counts[select(image, 10, "random", seed=seed).indices] += 1
    assert float(counts.std()) < 9  # binomial: sqrt(300 * .1 * .9) = 5.2


def test_uniform_is_evenly_spaced() -> None:
    assert select(features(576, 4), 1, "uniform").indices.tolist() == [288]
    gaps = select(features(576, 4), 64, "uniform").indices.diff()
    assert gaps.unique().tolist() == [9]


def test_the_folder_of_methods_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server looks methods up with every request."""
    import pkgutil

    known = list(methods())
    monkeypatch.setattr(pkgutil, "iter_modules", None)
    assert list(methods()) == known
