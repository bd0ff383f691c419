"""The entropy by products of float32 matrices against float64 eigenvalues; where its coefficients come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from promprune_vllm.bench import plain, spectra
from promprune_vllm.kernels import entropy_chain, entropy_fit, torch_ops

STATED = 3.36e-7  # beside the coefficients


def _scatter(x: Tensor) -> Tensor:
    unit = torch_ops.unit_rows(x)
    unit = unit - unit.mean(dim=0)
    n, d = x.shape
    return (unit @ unit.T if n <= d else unit.T @ unit)[None]


def test_the_coefficients_are_those_of_the_fit_and_keep_their_bound() -> None:
    committed = np.array(entropy_chain.COEFFICIENTS)
    assert committed.shape == (entropy_fit.PRODUCTS + 1, 4)
    assert not committed[~entropy_fit.used()].any()
    assert entropy_fit.bound(committed, points=20_000) <= 1.01 * STATED
    refitted = entropy_fit.fit()
    assert entropy_fit.bound(refitted, points=20_000) <= 1.1 * STATED
    x = np.linspace(0, 1, 1001)
    gap = np.tensordot(entropy_fit.basis(x), committed - refitted, 2)
    assert np.abs(gap / (1 + entropy_fit.SLOPE * x)).max() <= 2 * STATED


@pytest.mark.parametrize("family", spectra.FAMILIES)
def test_every_family_of_spectra_is_right_to_the_target_and_splits_alike(family: str) -> None:
    for n, d in ((5, 8), (123, 64), (577, 640)):
        x = spectra.features(family, n, d)
        exact = torch_ops.spectral_entropy(x)
        found = entropy_chain.spectral_entropy(_scatter(x))[0]
        assert abs(float(found - exact)) <= 2e-5
        for shift in torch.linspace(-0.06, 0.06, 25).tolist():
            mu = float(exact) + shift
            assert abs(plain.split(found, 64, mu, 0.02) - plain.split(exact, 64, mu, 0.02)) <= 1


def test_matrices_in_one_call_are_those_one_by_one_and_flat_ones_have_1() -> None:
    many = torch.cat([_scatter(spectra.features("power 1", 40, 60, seed)) for seed in range(3)])
    many[1] = 0
    together = entropy_chain.spectral_entropy(many)
    assert float(together[1]) == 1
    for i in (0, 2):
        alone = entropy_chain.spectral_entropy(many[i : i + 1])
        assert float(abs(together[i] - alone[0])) <= 1e-6


def test_one_direction_has_0_and_every_direction_evenly_1() -> None:
    line = torch.linspace(-1, 1, 30, dtype=torch.float64)
    assert float(entropy_chain.spectral_entropy(torch.outer(line, line)[None])[0]) <= 2e-5
    assert float(entropy_chain.spectral_entropy(torch.eye(30, dtype=torch.float64)[None])[0]) >= 1 - 2e-5
