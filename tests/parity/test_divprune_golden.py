"""DivPrune against the authors' code: the same tokens, wherever tokens differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promprune_vllm.kernels.ops import cosine_gram, max_min_select
from tests.golden import measure, recipe

METAS = recipe.metas("divprune")
pytestmark = pytest.mark.usefixtures("kernels")


def _name(meta: dict[str, Any]) -> str:
    return f"{meta['kind']}-{meta['n']}x{meta['d']}-k{meta['T']}"


def _outcome(meta: dict[str, Any]) -> measure.Outcome:
    try:
        return measure.outcome("divprune", meta["case"])
    except LookupError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("meta", METAS, ids=_name)
def test_selects_the_references_tokens(meta: dict[str, Any]) -> None:
    outcome = _outcome(meta)
    if outcome.judged:
        assert outcome.ours == outcome.stored
    else:  # the reference repeats tokens here; the different ones among its choices are ours too
        assert len(set(outcome.stored)) == meta["T"] - meta["dups"]
        assert set(outcome.stored) <= set(outcome.ours)
    assert len(set(outcome.ours)) == meta["T"]


@pytest.mark.parametrize("meta", [meta for meta in METAS if meta["dups"] == 0 and meta["d"] <= 1024], ids=_name)
def test_chooses_them_in_the_references_order(meta: dict[str, Any]) -> None:
    _outcome(meta)
    golden = recipe.case("divprune", meta)
    picks = max_min_select(cosine_gram(torch.from_numpy(golden.x)), meta["T"])
    assert picks.tolist() == golden.stored["idx64"].tolist()
