"""CDPruner, SPpruner and FSR: what the text does to a selection, and what happens where there is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from promprune_vllm import Need, VisionFeatures, get_method, methods, select
from promprune_vllm.errors import SettingsError
from promprune_vllm.kernels import ops
from promprune_vllm.methods.cdpruner import conditional_dpp, text_relevance
from promprune_vllm.methods.sppruner import find_subjects, grid_steps, scan_rings
from promprune_vllm.methods.sppruner import text_relevance as centred_relevance

NAN = float("nan")
INF = float("inf")
NAMES = [name for name, method in methods().items() if Need.TEXT in method.needs]
D = 16


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _group(seed: int = 1, grid: tuple[int, int, int] = (1, 5, 8), rows: int = 4) -> VisionFeatures:
    n = grid[0] * grid[1] * grid[2]
    return VisionFeatures(
        projected=_draw(seed, n, D),
        grid=grid,
        saliency=_draw(seed + 50, n).exp() / 99,
        text=_draw(seed + 90, rows, D),
    )


def _with(features: VisionFeatures, **changes: Any) -> VisionFeatures:
    return dataclasses.replace(features, **changes)


def _kept(features: VisionFeatures, keep: int, name: str, **options: Any) -> set[int]:
    selection = select(features, keep, name, **options)
    indices = selection.indices.tolist()
    assert indices == sorted(set(indices))
    assert len(indices) == keep
    return set(indices)


def test_all_three_are_prompt_aware() -> None:
    assert {"cdpruner", "sppruner", "fsr"} <= set(NAMES)
    with pytest.raises(ValueError, match="TEXT"):
        select(_with(_group(), text=None), 3, "cdpruner")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_text_names_is_kept(name: str) -> None:
    features = _with(_group(), saliency=torch.ones(40))
    for wanted in (3, 20, 39):
        named = 3 * features.projected[wanted : wanted + 1]
        assert wanted in _kept(_with(features, text=named), 4, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [1, 7, 39])
def test_inputs_without_structure(name: str, keep: int) -> None:
    features = _group()
    holes = features.projected.clone()
    holes[::3], holes[4, 2] = NAN, INF
    bad = torch.full((40,), NAN)
    for changes in (
        {"text": features.text[:0]},
        {"text": features.text[:1]},
        {"text": torch.zeros(3, D)},
        {"text": torch.full((3, D), NAN)},
        {"text": features.text[:1].expand(3, D)},
        {"saliency": torch.zeros(40)},
        {"saliency": bad},
        {"saliency": torch.where(torch.arange(40) % 5 == 0, INF, features.saliency)},
        {"projected": holes},
        {"projected": torch.zeros(40, D)},
        {"projected": features.projected[:1].expand(40, D)},
        {"projected": features.projected[torch.arange(40) % 5]},
        {"projected": torch.full((40, D), NAN), "saliency": bad, "text": features.text[:0]},
        {"projected": (features.projected * 1e30).bfloat16()},
        {"projected": features.projected.half(), "text": features.text.half()},
        {"grid": (1, 1, 40)},
        {"grid": (2, 4, 5)},
        {"grid": (40, 1, 1)},
    ):
        _kept(_with(features, **changes), keep, name)
    two = VisionFeatures(features.projected[:2], (1, 1, 2), features.saliency[:2], text=features.text)
    _kept(two, 1, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 5.0])
def test_a_common_scale_changes_nothing(name: str, scale: float) -> None:
    features = _group()
    scaled = _with(features, projected=features.projected.double() * scale, saliency=features.saliency * 4)
    assert _kept(features, 9, name) == _kept(scaled, 9, name)


def test_the_conditional_dpp_maximises_the_volume_of_its_kernel() -> None:
    gram = ops.cosine_gram(_draw(3, 12, 24))
    relevance = torch.rand(12, generator=torch.Generator().manual_seed(4)).double()
    relevance[5] = 0
    kernel = relevance[:, None] * gram * relevance[None, :]
    chosen: list[int] = []
    for _ in range(8):
        rest = [i for i in range(12) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    assert conditional_dpp(gram, relevance, 8).tolist() == chosen
    assert 5 not in conditional_dpp(gram, relevance, 11).tolist()


def test_cdpruner_without_preference_is_a_plain_dpp() -> None:
    features = _group()
    plain = _kept(features, 9, "promprune", kr_max=0.0)
    assert _kept(_with(features, text=features.text[:0]), 9, "cdpruner") == plain
    assert _kept(_with(features, text=torch.zeros(2, D)), 9, "cdpruner") == plain


def test_cdpruner_can_turn_the_relevance_round() -> None:
    features = _group()
    towards = text_relevance(features.projected, features.text)
    away = text_relevance(features.projected, features.text, sign=-1)
    assert towards.argsort().tolist() == away.argsort(descending=True).tolist()
    assert float(towards.max()) == pytest.approx(1, abs=1e-5)
    assert 0 <= float(towards.min()) < 1e-5
    assert _kept(features, 9, "cdpruner") != _kept(features, 9, "cdpruner", sign=-1)


def test_sppruner_without_text_follows_saliency() -> None:
    features = _group()
    silent = _with(features, text=features.text[:0])
    selection = select(silent, 10, "sppruner")
    top = set(features.saliency.topk(int(selection.report["focus_tokens"])).indices.tolist())
    assert top <= set(selection.indices.tolist())
    assert _kept(silent, 10, "sppruner", w=0.0, g=0.0) == _kept(silent, 10, "sppruner", w=1.0, g=0.0)


def test_sppruner_keeps_a_salient_subject_the_text_does_not_name() -> None:
    features = _group()
    loud = torch.full((40,), 1e-3)
    loud[17] = 0.5
    away = _with(features, saliency=loud, text=-features.projected[17:18])
    assert 17 in _kept(away, 8, "sppruner")


def test_sppruner_splits_the_budget_within_its_shares() -> None:
    for keep in range(1, 40):
        report = select(_group(grid=(1, 5, 8)), keep, "sppruner").report
        subjects, context = int(report["focus_tokens"]), int(report["context_tokens"])
        assert 1 <= subjects <= max(1, -(-keep // 4), int(0.6 * keep))
        assert subjects + context <= keep


def test_a_twin_beside_a_subject_is_no_subject() -> None:
    focus = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5]).double()
    rows, columns = grid_steps((1, 2, 3), torch.device("cpu"))
    beside = rows + columns == 1
    assert find_subjects(focus, beside & False, 5).tolist() == [True] * 3 + [False] * 3
    # 0 bars 1 and 3, its neighbours; 2 bars 5; 4 is left.
    assert find_subjects(focus, beside, 5).tolist() == [True, False, True, False, True, False]
    assert find_subjects(torch.zeros(6), beside, 5)[0]


def test_context_comes_ring_by_ring_from_what_resembles_a_subject() -> None:
    rows, columns = grid_steps((2, 1, 6), torch.device("cpu"))
    near = torch.maximum(rows, columns)
    subjects = torch.zeros(12, dtype=torch.bool)
    subjects[5] = True
    gram = torch.full((12, 12), 0.1).double().fill_diagonal_(1)
    gram[5, :5] = gram[:5, 5] = 0.5

    def scan(keep: int) -> list[int]:
        return scan_rings(gram, near, subjects, keep, 5).nonzero().flatten().tolist()

    # Four places left: half of them on ring 1, which has one token; then one each on rings 2, 3 and 4.
    assert scan(5) == [1, 2, 3, 4, 5]
    assert scan(12) == [0, 1, 2, 3, 4, 5]  # the other frame is no context
    gram[5, 3] = gram[3, 5] = 0  # unlike the subject: no context, however near
    assert scan(3) == [2, 4, 5]
    gram[4, 2] = gram[2, 4] = 1  # the same as a chosen token: no context either
    assert scan(3) == [1, 4, 5]


def test_context_prefers_what_resembles_its_subject_most() -> None:
    rows, columns = grid_steps((1, 1, 3), torch.device("cpu"))
    gram = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, 0.9], [0.0, 0.9, 1.0]]).double()
    middle = torch.tensor([False, True, False])
    assert scan_rings(gram, torch.maximum(rows, columns), middle, 2, 1).tolist() == [False, True, True]


@pytest.mark.parametrize(("w", "g"), [(0.5, 0.0), (0.5, 1.0), (0.5, 8.0), (0.0, 0.0), (1.0, 0.0)])
def test_the_first_subject_has_the_most_focus(w: float, g: float) -> None:
    for seed in range(12):
        features = _group(seed)
        s, r = ops.min_max(features.saliency), centred_relevance(features.projected, features.text)
        focus = w * s + (1 - w) * r + g * s * r
        assert _kept(features, 1, "sppruner", w=w, g=g) == {int(focus.argmax())}


def test_sppruner_aggregates_only_when_asked() -> None:
    features = _group()
    features = _with(features, projected=features.projected[torch.arange(40) // 4] + 0.1 * features.projected)
    plain, merged = (select(features, 10, "sppruner", aggregate=flag) for flag in (False, True))
    assert plain.rows is None
    assert torch.equal(plain.indices, merged.indices)
    own = features.projected[merged.indices]
    changed = (merged.rows != own).any(dim=1)
    assert changed.any()
    assert bool((merged.rows.norm(dim=1) <= features.projected.norm(dim=1).max()).all())
    assert float(torch.cosine_similarity(merged.rows, own).min()) > 0.6


def test_sppruner_aggregates_near_tokens_by_saliency() -> None:
    lengths = torch.arange(1.0, 13)
    saliency = torch.full((12,), 0.1)
    saliency[6] = 0.6
    features = VisionFeatures(lengths[:, None] * torch.ones(12, D), (1, 1, 12), saliency, text=torch.empty(0, D))
    selection = select(features, 1, "sppruner", aggregate=True)
    expected = (0.6 * 7 + 0.1 * (5 + 6 + 8 + 9)) / (0.6 + 4 * 0.1)
    assert selection.indices.tolist() == [6]
    assert selection.rows[0].tolist() == pytest.approx([expected] * D)


def test_merged_rows_are_weighted_means() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 4.0], [NAN, 1.0], [6.0, 6.0], [1.0, 1.0]])
    rows = ops.merge_rows(
        x, torch.tensor([0, 3]), torch.tensor([-1, 0, 0, -1, -1]), torch.tensor([2.0, 1.0, 1.0, 5.0, 9.0])
    )
    assert rows.tolist() == [[1.0, 1.0], [6.0, 6.0]]  # a row that is not finite is merged as a zero row
    alone = ops.merge_rows(x, torch.tensor([2, 3]), torch.tensor([-1] * 5), torch.zeros(5))
    assert torch.equal(alone.nan_to_num(), x[2:4].nan_to_num())


def test_fsr_refines_the_scan_and_leaves_the_focus_alone() -> None:
    features = _group()
    selection = select(features, 12, "fsr", rho=0.4)
    focus = int(selection.report["focus_tokens"])
    s = ops.min_max(features.saliency)
    phi = ops.min_max(ops.cross_cosine(features.projected, features.text).mean(dim=1)) ** 3 * s
    assert phi.topk(focus).values.sum() >= 0.4 * phi.sum() > phi.topk(focus - 1).values.sum()
    own = features.projected[selection.indices]
    changed = selection.indices[(selection.rows != own).any(dim=1)]
    assert 0 < len(changed) <= 12 - focus
    assert not set(changed.tolist()) & set(phi.topk(focus).indices.tolist())
    unrefined = select(features, 12, "fsr", rho=0.4, kappa=0.0)
    assert torch.equal(unrefined.indices, selection.indices)
    assert torch.equal(unrefined.rows, own)


def test_fsr_scans_away_from_focus_and_scan() -> None:
    features = _group()
    selection = select(features, 12, "fsr", rho=0.4)
    phi = ops.min_max(ops.cross_cosine(features.projected, features.text).mean(dim=1)) ** 3
    phi = phi * ops.min_max(features.saliency)
    chosen = phi.topk(int(selection.report["focus_tokens"])).indices.tolist()
    gram = ops.cosine_gram(features.projected)
    while len(chosen) < 12:
        chosen.append(int(gram[:, chosen].amax(dim=1).argmin()))
    assert set(selection.indices.tolist()) == set(chosen)


def test_fsr_without_text_focuses_on_the_salient() -> None:
    features = _group()
    silent = _with(features, text=features.text[:0])
    selection = select(silent, 12, "fsr", rho=0.3)
    top = set(features.saliency.topk(int(selection.report["focus_tokens"])).indices.tolist())
    assert top <= set(selection.indices.tolist())


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("cdpruner", {"sign": 0}, "0"),
        ("cdpruner", {"sign": True}, "True"),
        ("sppruner", {"w": 1.5}, "1.5"),
        ("sppruner", {"w": NAN}, "nan"),
        ("sppruner", {"g": -1.0}, "-1.0"),
        ("sppruner", {"aggregate": "no"}, "'no'"),
        ("fsr", {"alpha": -1.0}, "-1.0"),
        ("fsr", {"beta": INF}, "inf"),
        ("fsr", {"rho": 0.0}, "0.0"),
        ("fsr", {"kappa": -0.5}, "-0.5"),
        ("prunesid", {"score": "norm"}, "'norm'"),
        ("prunesid", {"lam": -1.0}, "-1.0"),
        ("prunesid", {"group_tokens": 0}, "0"),
    ],
)
def test_refuses_options_with_the_value(name: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=name) as refusal:
        get_method(name, **options)
    assert named in str(refusal.value)
