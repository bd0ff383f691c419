"""PromPrune's properties: the split of the budget, both stages, every option, and inputs without structure."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from promprune_vllm import Selection, VisionFeatures, get_method, select
from promprune_vllm.errors import SettingsError
from promprune_vllm.kernels import ops
from promprune_vllm.methods.promprune import Coverage, Entropy

NAN = float("nan")
INF = float("inf")
OPTIONS = [
    {"entropy": entropy, "coverage": coverage, "fps_from_salient": near}
    for entropy, coverage, near in itertools.product(get_args(Entropy), get_args(Coverage), (False, True))
    if coverage == "fps" or not near
]


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tokens(projected: Tensor, saliency: Tensor | None = None) -> VisionFeatures:
    n = projected.shape[0]
    if saliency is None:
        saliency = _draw(7, n).exp() / 1000
    return VisionFeatures(projected=projected, grid=(1, 1, n), saliency=saliency)


def _clusters(count: int, n: int = 48, d: int = 32) -> Tensor:
    return _draw(count, count, d)[torch.arange(n) % count] + 0.05 * _draw(1, n, d)


def _kept(selection: Selection, keep: int, n: int) -> set[int]:
    indices = selection.indices.tolist()
    assert len(indices) == keep
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < n
    return set(indices)


def _degenerate() -> dict[str, VisionFeatures]:
    base = _draw(3, 12, 8)
    holes = base.clone()
    holes[::3] = NAN
    holes[1, 2] = INF
    zeros = base.clone()
    zeros[::2] = 0
    return {
        "constant": _tokens(base[:1].expand(12, 8)),
        "constant attention": _tokens(base, torch.full((12,), 0.01)),
        "duplicates": _tokens(base[torch.arange(12) % 5]),
        "rank 1": _tokens(_draw(4, 12, 1) * _draw(5, 1, 8)),
        "zero rows": _tokens(zeros),
        "trace zero": _tokens(torch.zeros(12, 8)),
        "NaN and inf features": _tokens(holes),
        "nothing but NaN": _tokens(torch.full((12, 8), NAN), torch.full((12,), NAN)),
        "NaN attention": _tokens(base, torch.tensor([0.1, NAN, 0.3, -INF, INF, 0.0] * 2)),
        "no attention": _tokens(base, torch.zeros(12)),
        "one column": _tokens(base[:, :1]),
        "huge": _tokens(base.double() * 1e30),
        "tiny": _tokens(base.double() * 1e-30),
        "fp16": _tokens(base.half(), _draw(7, 12).exp().half()),
        "bf16": _tokens((base * 1e30).bfloat16()),
    }


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", _degenerate())
def test_every_option_keeps_k_distinct_tokens(kind: str) -> None:
    features = _degenerate()[kind]
    before = features.projected.clone(), features.saliency.clone()
    for options, keep, share in itertools.product(OPTIONS, (1, 5, 11), (None, 0.5)):
        shares = {} if share is None else {"kr_min": share, "kr_max": share}
        selection = select(features, keep, mu=0.8, tau=0.1, **options, **shares)
        _kept(selection, keep, 12)
        assert 0 <= float(selection.report[f"{options['entropy']}_entropy"]) <= 1 + 1e-9
    again = select(features, keep, mu=0.8, tau=0.1, **options, **shares)
    assert torch.equal(selection.indices, again.indices)
    assert torch.equal(features.projected.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(features.saliency.nan_to_num(), before[1].nan_to_num())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_two_tokens(options: dict[str, Any]) -> None:
    features = _tokens(_draw(0, 2, 8), torch.tensor([0.1, 0.2]))
    assert _kept(select(features, 1, kr_min=1.0, kr_max=1.0, **options), 1, 2) == {1}
    _kept(select(features, 1, **options), 1, 2)


@pytest.mark.parametrize("entropy", get_args(Entropy))
def test_a_given_entropy_decides_the_split_in_place_of_the_groups_own(entropy: str) -> None:
    own = _tokens(_clusters(6))
    for h in (0.0, 0.55, 0.58, 0.6, 0.63, 0.7, 1.0):
        report = select(replace(own, entropy=torch.tensor(h)), 24, mu=0.6, tau=0.02, entropy=entropy).report
        assert float(report[f"{entropy}_entropy"]) == pytest.approx(h)
        assert int(report["saliency_tokens"]) == round(24 / (1 + math.exp((h - 0.6) / 0.02)))
    method = get_method("promprune", entropy=entropy)
    same = select(replace(own, entropy=method.entropy_of(own)), 24, method)  # type: ignore[attr-defined]
    assert torch.equal(same.indices, select(own, 24, method).indices)


def test_a_higher_entropy_never_gets_more_salient_tokens() -> None:
    seen = []
    for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48):
        report = select(_tokens(_clusters(count)), 24, mu=0.6, tau=0.1).report
        seen.append((float(report["spectral_entropy"]), int(report["saliency_tokens"])))
    salient = [tokens for _, tokens in sorted(seen)]
    assert salient == sorted(salient, reverse=True)
    assert len(set(salient)) > 5


@pytest.mark.parametrize("entropy", get_args(Entropy))
def test_a_higher_mu_never_gets_fewer_salient_tokens(entropy: str) -> None:
    features = _tokens(_clusters(6) * (1 + torch.arange(48)[:, None]))
    salient = [
        int(select(features, 24, mu=mu / 20, tau=0.05, entropy=entropy).report["saliency_tokens"])
        for mu in range(0, 31, 3)
    ]
    assert salient == sorted(salient)
    assert (salient[0], salient[-1]) == (0, 24)


def test_the_alternative_entropies_are_the_papers() -> None:
    features = _tokens(_draw(2, 10, 6), torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0]))
    for entropy, weights in (
        ("attention", features.saliency.double()),
        ("feature_norm", features.projected.double().norm(dim=1)),
    ):
        p = weights / weights.sum()
        expected = -sum(float(q) * float(q.log()) for q in p if q > 0) / float(torch.tensor(10.0).log())
        report = select(features, 4, entropy=entropy).report
        assert float(report[f"{entropy}_entropy"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("coverage", get_args(Coverage))
def test_saliency_only_is_the_top_k(coverage: str) -> None:
    features = _tokens(_draw(1, 40, 16))
    top = set(features.saliency.topk(13).indices.tolist())
    assert _kept(select(features, 13, kr_min=1.0, kr_max=1.0, coverage=coverage), 13, 40) == top


@pytest.mark.usefixtures("kernels")
def test_saliency_ties_go_to_the_lowest_index_and_nan_ranks_last() -> None:
    saliency = torch.tensor([0.1, NAN, 0.5, 0.1, -INF, 0.1, INF, 0.1])
    features = _tokens(_draw(1, 8, 4), saliency)
    assert _kept(select(features, 4, kr_min=1.0, kr_max=1.0), 4, 8) == {6, 2, 0, 3}
    assert _kept(select(features, 6, kr_min=1.0, kr_max=1.0), 6, 8) == {6, 2, 0, 3, 5, 7}


@pytest.mark.parametrize("coverage", get_args(Coverage))
def test_coverage_only_ignores_saliency(coverage: str) -> None:
    projected = _draw(1, 40, 64)
    one, other = (
        _kept(select(_tokens(projected, _draw(s, 40).exp()), 13, kr_max=0.0, coverage=coverage), 13, 40)
        for s in (1, 2)
    )
    assert one == other


@pytest.mark.parametrize("coverage", get_args(Coverage))
def test_a_fixed_share_splits_the_budget(coverage: str) -> None:
    features = _tokens(_draw(1, 40, 16))
    for share, expected in ((0.25, 4), (0.5, 8), (0.34375, 6), (0.65625, 10)):  # the last two: 5.5 and 10.5
        selection = select(features, 16, kr_min=share, kr_max=share, coverage=coverage)
        assert int(selection.report["saliency_tokens"]) == expected
        assert set(features.saliency.topk(expected).indices.tolist()) <= _kept(selection, 16, 40)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("coverage", get_args(Coverage))
def test_coverage_reaches_every_different_token_before_repeating(coverage: str) -> None:
    features = _tokens(_draw(6, 6, 16)[torch.arange(30) % 6])
    kept = _kept(select(features, 8, kr_max=0.0, coverage=coverage), 8, 30)
    assert {token % 6 for token in kept} == set(range(6))
    # The six are the first of their kind, the two others the most salient of what is left.
    assert set(range(6)) <= kept
    assert kept - set(range(6)) == set((features.saliency[6:].topk(2).indices + 6).tolist())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("coverage", get_args(Coverage))
@pytest.mark.parametrize("hole", [0.0, NAN, INF])
def test_rows_without_direction_are_covered_last(coverage: str, hole: float) -> None:
    projected = _draw(1, 20, 32)
    projected[[0, 7]] = hole
    for share in (0.0, 0.5):
        features = _tokens(projected, torch.where(torch.arange(20) % 7 == 0, 0.0, 1.0))
        options = {"kr_min": share, "kr_max": share, "coverage": coverage}
        assert not {0, 7} & _kept(select(features, 17, **options), 17, 20)
        assert 0 in _kept(select(features, 19, **options), 19, 20)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("coverage", get_args(Coverage))
@pytest.mark.parametrize("scale", [2.0**-60, 1e-6, 3.0, 1e25])
def test_a_common_scale_changes_nothing(coverage: str, scale: float) -> None:
    projected = _draw(1, 40, 16).double()
    for entropy in get_args(Entropy):
        options = {"kr_min": 0.2, "kr_max": 0.8, "mu": 0.9, "tau": 0.1, "coverage": coverage, "entropy": entropy}
        one, other = (
            select(_tokens(x, a), 13, **options)
            for x, a in ((projected, _draw(1, 40).exp()), (projected * scale, _draw(1, 40).exp() * scale))
        )
        assert torch.equal(one.indices, other.indices)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("n", "given", "keep"), [(14, 0, 6), (14, 4, 9), (9, 8, 8), (14, 1, 13)])
def test_greedy_rules_against_their_definitions(n: int, given: int, keep: int) -> None:
    x = _draw(n + given, n, 32).double()
    gram = ops.cosine_gram(x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    start = order[:given].tolist()
    count = torch.tensor(given)
    seed = None
    if 0 < given < keep:
        rest = [i for i in range(n) if i not in start]
        seed = min(rest, key=lambda i: float(gram[i, start].max()))

    def volume(chosen: list[int]) -> float:
        return float(torch.logdet(gram[chosen][:, chosen])) if chosen else 0.0

    def spread(chosen: list[int], among: list[int]) -> float:
        return -float(gram[chosen[-1], among + chosen[:-1]].max()) if among + chosen[:-1] else 0.0

    def represented(chosen: list[int]) -> float:
        return float(gram[[i for i in range(n) if i not in start]][:, chosen].amax(dim=1).sum())

    def grow(score: Any, first: int | None) -> list[int]:
        new: list[int] = []
        while given + len(new) < keep:
            rest = [i for i in range(n) if i not in start and i not in new]
            pick = max(rest, key=lambda i: (round(score([*new, i]), 9), -i))
            new.append(first if first is not None and not new else pick)
        return new

    assert ops.greedy_dpp(gram, order, count, keep).tolist() == start + grow(volume, seed)
    assert ops.farthest_points(gram, order, count, keep).tolist() == start + grow(lambda c: spread(c, []), seed)
    picks = ops.farthest_points(gram, order, count, keep, from_given=True)
    assert picks.tolist() == start + grow(lambda c: spread(c, start), seed)
    assert ops.facility_location(gram, order, count, keep).tolist() == start + grow(represented, None)


def test_farthest_points_can_keep_away_from_the_salient() -> None:
    features = _tokens(_draw(1, 40, 8))
    gram, order = ops.cosine_gram(features.projected), ops.descending_order(features.saliency)
    options = {"kr_min": 0.5, "kr_max": 0.5, "coverage": "fps"}
    for near in (False, True):
        kept = _kept(select(features, 16, fps_from_salient=near, **options), 16, 40)
        assert kept == set(ops.farthest_points(gram, order, torch.tensor(8), 16, from_given=near).tolist())
    assert kept != _kept(select(features, 16, **options), 16, 40)


@pytest.mark.usefixtures("kernels")
def test_spectral_entropy_knows_its_ends() -> None:
    assert float(ops.spectral_entropy(torch.eye(64))) > 0.99
    line = torch.stack([torch.ones(30), torch.linspace(-1, 1, 30)], dim=1) @ _draw(1, 2, 64)
    assert float(ops.spectral_entropy(line)) < 0.2
    for flat in (torch.zeros(5, 8), torch.ones(5, 8), torch.full((5, 8), NAN), torch.ones(1, 8), torch.ones(5, 1)):
        assert float(ops.spectral_entropy(flat)) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kr_min": 0.6, "kr_max": 0.5}, "0.6"),
        ({"kr_max": 1.5}, "1.5"),
        ({"kr_min": NAN}, "nan"),
        ({"tau": 0.0}, "0.0"),
        ({"mu": INF}, "inf"),
        ({"entropy": "spectrum"}, "spectral, feature_norm, attention"),
        ({"coverage": "kmeans"}, "dpp, fps, facility_location"),
        ({"fps_from_salient": True}, "coverage='dpp'"),
        ({"exact_entropy": True, "entropy": "attention"}, "entropy='attention'"),
        ({"exact_entropy": "no"}, "'no'"),
        ({"fps_from_salient": "false", "coverage": "fps"}, "'false'"),
    ],
)
def test_refuses_options_with_the_value_and_the_limit(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match="promprune") as refusal:
        get_method("promprune", **options)
    assert named in str(refusal.value)
