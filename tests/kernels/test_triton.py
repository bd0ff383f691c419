"""The kernels of the CUDA path against the reference: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from promprune_vllm import VisionFeatures, select, select_many
from promprune_vllm.kernels import (
    entropy_chain,
    ops,
    torch_greedy,
    torch_ops,
    triton_gram,
    triton_greedy,
    triton_ops,
)

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("wide_tiles")


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _power(n: int, d: int, seed: int = 0) -> Tensor:
    return _draw(seed, n, d) * torch.arange(1, d + 1) ** -0.5


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [
        *((n, d, dtype) for n, d in ((5, 8), (5, 3), (123, 64), (123, 300)) for dtype in DTYPES),
        (577, 100, torch.float16),
        (1296, 60, torch.bfloat16),
    ],
    ids=str,
)
def test_cosines_of_any_shape_and_type(
    n: int, d: int, dtype: torch.dtype, device: torch.device, wide_tiles: Callable[[int], None]
) -> None:
    wide_tiles(n)
    x = _power(n, d).to(dtype).to(device)
    exact = torch_ops.cosine_gram(x)
    if n > 1000 and device.type == "cpu":  # a program per row of the preparation is half a minute of interpreter
        gram = triton_gram._products_of(x[None], 1 / x.double().norm(dim=1)[None])[0]
    else:
        gram = triton_ops.cosine_gram(x)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    assert (gram.diagonal() == 1).all()
    torch.testing.assert_close(gram, exact, rtol=0, atol=1e-6)  # the interpreter's chunks are wide


@pytest.mark.parametrize(("n", "d"), [(5, 8), (5, 3), (123, 64), (123, 300)], ids=str)
def test_entropy_of_any_shape(n: int, d: int, device: torch.device, wide_tiles: Callable[[int], None]) -> None:
    wide_tiles(min(n, d))
    x = _power(n, d).bfloat16().to(device)
    assert abs(float(triton_ops.Cosines([x]).entropies()[0] - torch_ops.spectral_entropy(x))) <= 2e-5


def test_tiles_of_their_real_size_give_the_same(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.undo()
    x = _power(70, 130).bfloat16().to(device)
    for tile in triton_gram.TILES:
        monkeypatch.setattr(triton_gram, "TILES", (tile, tile))
        torch.testing.assert_close(triton_ops.cosine_gram(x), torch_ops.cosine_gram(x), rtol=0, atol=2e-7)
    assert abs(float(triton_ops.spectral_entropy(x) - torch_ops.spectral_entropy(x))) <= 2e-5


def test_rows_of_every_range_and_broken_rows(device: torch.device) -> None:
    base = _power(30, 90)
    ranged = base * 10.0 ** torch.linspace(-30, 30, 30)[:, None]
    broken, zeros = base.clone(), base.clone()
    broken[::7], broken[3, 5], broken[4, 0] = NAN, INF, -INF
    zeros[::3] = 0
    for x in (ranged, ranged.bfloat16(), broken.half(), zeros):
        moved = x.to(device)
        torch.testing.assert_close(triton_ops.cosine_gram(moved), torch_ops.cosine_gram(moved), rtol=0, atol=1e-6)
        assert abs(float(triton_ops.spectral_entropy(moved) - torch_ops.spectral_entropy(moved))) <= 2e-5
    same = base[:1].expand(30, 90).to(device)
    assert float(triton_ops.spectral_entropy(same)) == 1  # tokens that do not differ


def test_repeated_tokens_tie_to_the_bit(device: torch.device) -> None:
    x = _power(9, 300)[torch.arange(45) % 9].bfloat16().to(device)
    gram = triton_ops.cosine_gram(x)
    off = ~torch.eye(45, dtype=torch.bool, device=device)
    for token in range(9, 45):
        both = off[token] & off[token % 9]
        assert torch.equal(gram[token][both], gram[token % 9][both])
    for given in (0, 3):
        order, count = _order(45).to(device), torch.tensor(given, device=device)
        expected = torch_greedy.greedy_dpp(torch_ops.cosine_gram(x), order, count, 30)
        assert torch.equal(triton_ops.Cosines([x]).greedy_dpp([order], [count], [30])[0], expected)


@pytest.mark.parametrize(("n", "keeps"), [(5, (1, 2, 4)), (123, (1, 2, 70)), (576, (24,)), (577, (34,))], ids=str)
def test_the_dpp_takes_the_references_tokens(n: int, keeps: tuple[int, ...], device: torch.device) -> None:
    x = _power(n, 64).to(device)
    if n == 123:
        x[5], x[7] = 0, x[6]
    gram, order = torch_ops.cosine_gram(x), _order(n).to(device)
    before = gram.clone(), order.clone()
    for keep in keeps:
        for given in {0, keep // 4, keep} if n < 500 else {keep // 4}:
            count = torch.tensor(given, device=device)
            expected = torch_greedy.greedy_dpp(gram, order, count, keep)
            assert torch.equal(triton_ops.greedy_dpp(gram, order, count, keep), expected), (keep, given)
            by_rows = torch_greedy.greedy_dpp_by_rows(torch_ops.unit_rows(x), order, count, keep)
            assert torch.equal(by_rows, expected)
    assert torch.equal(gram, before[0])
    assert torch.equal(order, before[1])


@pytest.mark.parametrize("panel", [4, 8])
def test_panels_are_one_loop(panel: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exhausted, filled up, and with a quality: rank 9 of 31 tokens, of which all but one are kept."""
    monkeypatch.setattr(triton_greedy, "ONE_PANEL", (0, 0))
    monkeypatch.setattr(triton_greedy, "PANEL", panel)
    x = (_draw(1, 31, 9) @ _draw(2, 9, 40)).to(device)
    gram, order = torch_ops.cosine_gram(x), _order(31).to(device)
    for given, keep in ((0, 30), (7, 30), (30, 30)):
        count = torch.tensor(given, device=device)
        for quality in (None, torch.rand(31, generator=torch.Generator().manual_seed(1)).double().to(device)):
            expected = torch_greedy.greedy_dpp(gram, order, count, keep, quality)
            assert torch.equal(triton_ops.greedy_dpp(gram, order, count, keep, quality), expected)
            by_rows = torch_greedy.greedy_dpp_by_rows(torch_ops.unit_rows(x), order, count, keep, quality)
            assert torch.equal(by_rows, expected)


def test_images_in_one_launch_are_those_one_by_one(device: torch.device) -> None:
    x = torch.stack([_power(40, 90, seed) for seed in range(3)]).bfloat16().to(device)
    order = torch.stack([_order(40)] * 3).to(device)
    given = torch.tensor([0, 4, 9], device=device)
    gram = triton_gram.cosines(x)
    picks = triton_greedy.greedy_dpp(gram, order, given, 12)
    entropies = entropy_chain.spectral_entropy(gram, triton_gram.TritonChain())
    for i in range(3):
        assert torch.equal(gram[i], triton_ops.cosine_gram(x[i]))
        assert torch.equal(picks[i], triton_ops.greedy_dpp(gram[i], order[i], given[i], 12))
        assert torch.equal(
            entropies[i : i + 1], entropy_chain.spectral_entropy(gram[i : i + 1], triton_gram.TritonChain())
        )


def test_crops_of_one_shape_share_their_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops of 40, 40, 31 and 40 tokens, of which three are taken together, keep what each keeps by itself."""
    monkeypatch.setattr(ops, "_path", lambda _: ("Triton", triton_ops, ""))
    sizes, keeps = (40, 40, 31, 40), (12, 11, 9, 1)
    crops = [
        VisionFeatures(
            projected=_power(n, 90, seed).bfloat16().to(device),
            grid=(1, 1, n),
            saliency=_order(n).roll(seed).to(device),
        )
        for seed, n in enumerate(sizes)
    ]
    seen: list[int] = []
    grams = triton_gram.cosines
    monkeypatch.setattr(triton_gram, "cosines", lambda x: seen.append(len(x)) or grams(x))
    together = select_many(crops, keeps, mu=0.8, tau=0.1)
    assert seen == [3, 1]
    for crop, keep, selection in zip(crops, keeps, together, strict=True):
        alone = select(crop, keep, mu=0.8, tau=0.1)
        assert torch.equal(selection.indices, alone.indices)
        torch.testing.assert_close(dict(selection.report), dict(alone.report), rtol=0, atol=1e-9)
    monkeypatch.setattr(triton_ops, "DENSE", 41)  # no two matrices fit
    assert [each.indices.tolist() for each in select_many(crops, keeps, mu=0.8, tau=0.1)] == [
        each.indices.tolist() for each in together
    ]
    assert seen[-4:] == [1, 1, 1, 1]


def test_beyond_the_dense_size_nothing_is_quadratic(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(triton_ops, "DENSE", 100)
    monkeypatch.setattr(triton_ops, "SIDE", 100)
    monkeypatch.setattr(triton_ops, "cosine_gram", lambda x: shapes.append(x.shape[0]) or torch_ops.cosine_gram(x))
    shapes: list[int] = []
    order = _order(300).to(device)
    for width in (64, 400):  # a D x D matrix; or that of a sample
        x = _power(300, width).to(device)
        shared, slow = triton_ops.Cosines([x]), torch_ops.cosine_gram(x)
        count = torch.tensor(6, device=device)
        (tokens,) = shared.greedy_dpp([order], [count], [30])
        assert torch.equal(tokens, torch_greedy.greedy_dpp(slow, order, count, 30))
        error = abs(float(shared.entropies()[0] - torch_ops.spectral_entropy(x)))
        assert error <= (2e-5 if width == 64 else 0.1)  # the entropy of a third of the tokens
    assert shapes == [100]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_received_attention_is_the_column_mean_of_the_map(dtype: torch.dtype, device: torch.device) -> None:
    for patches, heads, width in ((1, 2, 4), (37, 3, 8), (300, 2, 80)):
        q, k = (_draw(seed, patches, heads, width).to(dtype).to(device) for seed in (1, 2))
        expected = torch_ops.received_attention(q, k, width**-0.5)
        torch.testing.assert_close(triton_ops.received_attention(q, k, width**-0.5), expected, rtol=1e-5, atol=0)


def test_scores_beyond_what_exp_holds(device: torch.device) -> None:
    keys = torch.zeros(6, 2, 16, device=device)
    keys[3] = 1e4
    received = triton_ops.received_attention(torch.ones(6, 2, 16, device=device), keys, 1.0)
    assert received.tolist() == [0, 0, 0, 1, 0, 0]


def test_promprune_keeps_what_the_reference_keeps(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x = _power(100, 200).bfloat16().to(device)
    features = VisionFeatures(projected=x, grid=(1, 10, 10), saliency=torch.arange(100.0, device=device))
    options = {"mu": float(torch_ops.spectral_entropy(x)) - 0.022}
    monkeypatch.setattr(ops, "_path", lambda _: ("torch reference", torch_ops, ""))
    expected = select(features, 24, **options)
    monkeypatch.setattr(ops, "_path", lambda _: ("Triton", triton_ops, ""))
    for exact in (False, True):
        found = select(features, 24, **options, exact_entropy=exact)
        assert torch.equal(found.indices, expected.indices)
        error = abs(float(found.report["spectral_entropy"] - expected.report["spectral_entropy"]))
        assert error == 0 if exact else error <= 1e-5
    assert 0 < int(expected.report["saliency_tokens"]) < 24


@pytest.mark.cuda
def test_selection_is_captured_in_a_cuda_graph_and_never_waits() -> None:
    device = torch.device("cuda")
    x = _power(576, 4096).bfloat16().to(device)
    features = VisionFeatures(projected=x, grid=(1, 24, 24), saliency=torch.rand(576, device=device))
    expected = select(features, 64, mu=0.8).indices  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        select(features, 64, mu=0.8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select(features, 64, mu=0.8).indices
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, expected)
