"""VisionZip against the authors' code, on patches: CLS is the first row of its output and not ours to keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from promprune_vllm import Need, select
from promprune_vllm.methods.visionzip import assign
from tests.golden import measure, recipe

METAS = recipe.metas("visionzip")
pytestmark = pytest.mark.usefixtures("kernels")


def _name(meta: dict[str, Any]) -> str:
    return f"{meta['kind']}-{meta['dom']}+{meta['ctx']}"


def _golden(meta: dict[str, Any]) -> recipe.Case:
    golden = recipe.case("visionzip", meta)
    if not recipe.comparable(golden):
        pytest.skip(measure.INCOMPARABLE)
    return golden


@pytest.mark.parametrize("meta", METAS, ids=_name)
def test_keeps_the_references_dominant_tokens_and_targets(meta: dict[str, Any]) -> None:
    _golden(meta)
    outcome = measure.outcome("visionzip", meta["case"])
    assert outcome.ours == outcome.stored
    assert len(outcome.ours) == meta["dom"] - 1 + meta["ctx"]


@pytest.mark.parametrize("meta", METAS, ids=_name)
def test_assigns_tokens_as_the_reference(meta: dict[str, Any]) -> None:
    golden = _golden(meta)
    keys = torch.from_numpy(recipe.tower(golden).keys[1:])[measure.visionzip_rest(golden)]
    targets, into = assign(keys, meta["ctx"])
    assert targets.tolist() == golden.stored["targets"].tolist()
    assert into[into >= 0].tolist() == golden.stored["assign"].tolist()
    assert (into[targets] == -1).all()


@pytest.mark.parametrize("meta", METAS, ids=_name)
def test_merges_the_references_rows(meta: dict[str, Any]) -> None:
    golden = _golden(meta)
    selection = select(measure.tower_features(golden), meta["dom"] + meta["ctx"] - 1, "visionzip")
    assert selection.rows is not None
    assert selection.space is Need.ENCODER
    place = torch.searchsorted(selection.indices, measure.visionzip_anchors(golden))
    rows = selection.rows[place].numpy()  # in the reference's order
    np.testing.assert_allclose(rows[:, :8], golden.stored["out_head"][1:], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows.astype(np.float64).sum(axis=1), golden.stored["out_rowsum"][1:], rtol=1e-4)
