"""The CPU path against the float64 reference: the same entropies, the same tokens in the same order."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from promprune_vllm import VisionFeatures, select
from promprune_vllm.config import Settings
from promprune_vllm.demo.threads import torch_threads
from promprune_vllm.errors import SettingsError
from promprune_vllm.kernels import (
    cpu_cosines,
    cpu_gram,
    cpu_loops,
    cpu_ops,
    ops,
    torch_cosines,
    torch_greedy,
    torch_ops,
)

NAN, INF = float("nan"), float("inf")
SHAPES = [(5, 8), (5, 3), (123, 64), (123, 700), (576, 130), (577, 600), (1296, 64)]
few = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPRUNE_KERNELS", raising=False)


@pytest.fixture(scope="module", autouse=True)
def _one_warm_thread() -> Iterator[None]:
    with torch_threads(1):
        cpu_ops.warm_up()
        yield


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _power(n: int, d: int, seed: int = 0) -> Tensor:
    return _draw(seed, n, d) * torch.arange(1, d + 1) ** -0.5


def _hostile() -> dict[str, Tensor]:
    base = _power(140, 200)
    holes, zeros, ranged = base.clone(), base.clone(), base.clone()
    holes[::7], holes[3, 5], holes[4, 0] = NAN, INF, -INF
    zeros[::3] = 0
    ranged *= 10.0 ** torch.linspace(-30, 30, 140)[:, None]
    return {
        "duplicates": base[torch.arange(140) % 7],
        "one duplicate": base[torch.tensor([*range(139), 12])],
        "opposite": torch.cat([base[:70], -base[:70]]),
        "constant": base[:1].expand(140, 200),
        "low rank": _draw(1, 140, 4) @ _draw(2, 4, 200),
        "low rank and noise": _draw(1, 140, 4) @ _draw(2, 4, 200) + 1e-3 * base,
        "off centre": base + 30 * _power(1, 200, seed=9),
        "duplicates off centre": (base + 30 * _power(1, 200, seed=9))[torch.arange(140) % 7],
        "orthogonal": torch.eye(140, 200),
        "signs": _draw(3, 140, 200).sign(),
        "NaN and inf rows": holes,
        "only NaN": torch.full((140, 200), NAN),
        "zero rows": zeros,
        "all zero": torch.zeros(140, 200),
        "one column": base[:, :1],
        "every range": ranged,
        "beyond float32": base.double() * 1e150,
        "below float32": base.double() * 1e-200,
    }


def _order(n: int, seed: int = 5) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _same_decisions(x: Tensor, keep: int, salient: int) -> None:
    """Compare everything PromPrune and the other methods ask of cosines."""
    order, count = _order(x.shape[0]), torch.tensor(salient)
    fast, slow = cpu_cosines.Cosines(x), torch_cosines.Cosines(x)
    assert abs(float(fast.entropy()) - float(slow.entropy())) <= 2e-5
    gram = slow.matrix()
    assert torch.allclose(fast.matrix(), gram, rtol=0, atol=1e-12)
    picks = torch_greedy.greedy_dpp(gram, order, count, keep)
    assert torch.equal(fast.greedy_dpp(order, count, keep), picks)
    assert torch.equal(cpu_ops.greedy_dpp(gram, order, count, keep), picks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES, ids=str)
def test_any_shape_and_type_gives_what_float64_gives(n: int, d: int, dtype: torch.dtype) -> None:
    x = _power(n, d).to(dtype)
    for keep in {1, 2, n // 5 + 1, n - 1} if n < 500 else {1, 2, 70}:
        for salient in {0, 1, keep // 4, keep} if n < 500 else {keep // 4}:
            _same_decisions(x, keep, salient)


def test_keeping_all_but_one_of_many_tokens_is_the_same_too() -> None:
    _same_decisions(_power(577, 640), 576, 100)


@pytest.mark.parametrize("kind", _hostile())
def test_hostile_tokens_give_what_float64_gives(kind: str) -> None:
    x = _hostile()[kind]
    for keep, salient in ((1, 0), (1, 1), (9, 0), (70, 20), (139, 20), (139, 139)):
        _same_decisions(x, keep, salient)
    gram = torch_ops.cosine_gram(x)
    for keep in (1, 2, 70, 139):
        assert torch.equal(cpu_ops.max_min_select(gram, keep), torch_ops.max_min_select(gram, keep))


@few
@given(
    n=st.integers(2, 40) | st.integers(128, 150),
    d=st.integers(1, 48) | st.integers(128, 150),
    shape=st.tuples(st.integers(1, 48), st.integers(1, 4), st.sampled_from([0.0, 1.0, 10.0])),
    seed=st.integers(0, 10**6),
    choice=st.data(),
)
def test_drawn_tokens_give_what_float64_gives(
    n: int, d: int, shape: tuple[int, int, float], seed: int, choice: st.DataObject
) -> None:
    rank, repeats, common = shape
    x = _draw(seed, n, rank) @ _draw(seed + 1, rank, d) + common * _draw(seed + 2, 1, d)
    x = x[torch.arange(n) // repeats]
    keep = choice.draw(st.integers(1, min(n - 1, 40)))
    _same_decisions(x, keep, choice.draw(st.integers(0, keep)))
    gram = torch_ops.cosine_gram(x)
    assert torch.equal(cpu_ops.max_min_select(gram, keep), torch_ops.max_min_select(gram, keep))


@pytest.mark.parametrize("n", [5, 123, 577])
def test_quality_weights_the_choice_as_in_the_reference(n: int) -> None:
    x, order = _power(n, 64), _order(n)
    gram = torch_ops.cosine_gram(x)
    for quality in (torch.rand(n, generator=torch.Generator().manual_seed(1)), torch.ones(n), torch.zeros(n)):
        for keep in {1, 2, min(n - 1, 40)}:
            for salient in {0, keep // 2, keep}:
                count = torch.tensor(salient)
                expected = torch_greedy.greedy_dpp(gram, order, count, keep, quality.double())
                assert torch.equal(cpu_ops.greedy_dpp(gram, order, count, keep, quality), expected)
                assert torch.equal(cpu_cosines.Cosines(x).greedy_dpp(order, count, keep, quality), expected)


def test_a_near_tie_below_float32_is_decided_in_float64() -> None:
    """Tokens 1 and 2 differ in their cosine to token 0 by 1e-9, and float32 sees none of it."""
    for better in (1, 2):
        x = torch.zeros(4, 6, dtype=torch.float64)
        x[0, 0], x[3, 0], x[3, 3] = 1, 1, 0.2
        for token, column in ((1, 1), (2, 2)):
            x[token, 0], x[token, column] = 0.3 + (0 if token == better else 1e-9), 1
        shared = cpu_cosines.Cosines(x)
        gram = shared.single[0]
        assert abs(float(gram[0, 1] - gram[0, 2])) < 1e-7
        assert shared.greedy_dpp(torch.arange(4), torch.tensor(1), 2).tolist() == [0, better]


def test_a_wrong_proposal_is_corrected_and_an_unsound_one_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    x, order, count = _power(123, 200), _order(123), torch.tensor(10)
    expected = torch_cosines.Cosines(x).greedy_dpp(order, count, 60)
    for noise in (1e-7, 1e-6, 1e-4, 1e-2):
        shared = cpu_cosines.Cosines(x)
        gram, features = shared.single
        shake = noise * _draw(4, 123, 123)
        shared.__dict__["single"] = (gram + (shake + shake.T).fill_diagonal_(0), features)
        assert torch.equal(shared.greedy_dpp(order, count, 60), expected)
    monkeypatch.setattr(cpu_cosines, "PROPOSALS", 0)
    assert torch.equal(cpu_cosines.Cosines(x).greedy_dpp(order, count, 60), expected)


def test_shortened_float32_products_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    x = _power(50, 80)
    shared = cpu_cosines.Cosines(x)
    _same_decisions(x, 20, 5)
    assert float(shared.entropy()) == float(torch_ops.spectral_entropy(x))
    shared.greedy_dpp(_order(50), torch.tensor(5), 20)
    assert "single" not in shared.__dict__


def test_grams_are_symmetric_to_the_bit_with_a_diagonal_of_one() -> None:
    for n, d in SHAPES:
        for dtype in (torch.float32, torch.float64):
            gram, _ = cpu_gram.cosines(_power(n, d), dtype)
            assert torch.equal(gram, gram.T)
            assert (gram.diagonal() == 1).all()


def test_received_attention_is_the_column_mean_of_the_map() -> None:
    for patches, heads, width in ((1, 2, 4), (37, 3, 8), (577, 2, 16), (1030, 1, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            q, k = (_draw(seed, patches, heads, width).to(dtype) for seed in (1, 2))
            expected = torch_ops.received_attention(q, k, width**-0.5)
            got = cpu_ops.received_attention(q, k, width**-0.5)
            assert got.dtype == torch.float32
            assert torch.allclose(got, expected, rtol=1e-5, atol=0)
            assert math.isclose(float(got.sum()), 1, abs_tol=1e-5)


def test_features_that_want_gradients_are_taken_as_they_are() -> None:
    x = _power(40, 30).requires_grad_()
    saliency = torch.rand(40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for method in ("promprune", "divprune"):
        features = VisionFeatures(projected=x, grid=(1, 1, 40), saliency=saliency)
        assert select(features, 9, method).indices.shape == (9,)


def _hide_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed, whatever this process has imported before."""
    for name in [name for name in sys.modules if name.startswith("promprune_vllm.kernels.triton_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("promprune_vllm.kernels.triton_ops", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(ops, "_triton", ops._triton.__wrapped__)


def test_the_fast_path_is_taken_unless_the_reference_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _power(60, 80)
    features = VisionFeatures(projected=x, grid=(1, 1, 60), saliency=torch.arange(60.0))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert ops.in_force(cpu) == "numba on cpu"
    _hide_triton(monkeypatch)
    assert ops.in_force(cuda).startswith("torch reference on cuda (slower: Triton cannot be used: ")
    assert ops.in_force(torch.device("meta")) == "torch reference on meta (there is no fast path for meta)"
    assert isinstance(ops.cosines([x])._cosines, cpu_cosines.Cosines)  # type: ignore[attr-defined]
    assert isinstance(ops.cosines([x.to("meta")])._cosines, torch_cosines.Cosines)  # type: ignore[attr-defined]
    fast = select(features, 20, mu=0.8, tau=0.1)
    monkeypatch.setenv("PROMPRUNE_KERNELS", "reference")
    assert ops.in_force(cpu) == "torch reference on cpu (PROMPRUNE_KERNELS=reference)"
    assert isinstance(ops.cosines([x])._cosines, torch_cosines.Cosines)  # type: ignore[attr-defined]
    monkeypatch.setattr(cpu_gram, "cosines", None)
    slow = select(features, 20, mu=0.8, tau=0.1)
    assert torch.equal(fast.indices, slow.indices)
    assert float(slow.report["spectral_entropy"]) == float(torch_ops.spectral_entropy(x))
    assert torch.equal(ops.cosine_gram(x), torch_ops.cosine_gram(x))


def test_a_path_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPRUNE_KERNELS", "quick")
    with pytest.raises(ValueError, match="PROMPRUNE_KERNELS must be one of fast, reference, got 'quick'"):
        ops.cosine_gram(_power(5, 5))
    with pytest.raises(SettingsError, match="kernels"):
        Settings.from_environment()


def test_the_path_in_force_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ops._log.cache_clear()
    with caplog.at_level("INFO", logger="vllm.promprune"):
        ops.warm_up(torch.device("cpu"))
        ops.warm_up(torch.device("cpu"))
    assert [record.getMessage() for record in caplog.records] == ["selection kernels: numba on cpu"]


def test_kernels_that_cannot_be_compiled_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: torch.device) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(cpu_ops, "warm_up", broken)
    with pytest.raises(
        RuntimeError, match=r"for cpu could not be compiled: no compiler\. PROMPRUNE_KERNELS=reference"
    ):
        ops.warm_up(torch.device("cpu"))


def test_warming_up_leaves_nothing_to_compile() -> None:
    compiled = [cpu_loops._grow, cpu_loops.max_min_select]
    before = [len(loop.signatures) for loop in compiled]  # type: ignore[attr-defined]
    select(VisionFeatures(projected=_power(60, 80), grid=(1, 1, 60), saliency=torch.arange(60.0)), 20)
    cpu_ops.greedy_dpp(torch_ops.cosine_gram(_power(9, 9)), _order(9), torch.tensor(0), 3, torch.ones(9))
    cpu_ops.max_min_select(torch_ops.cosine_gram(_power(9, 9)), 3)
    assert [len(loop.signatures) for loop in compiled] == before  # type: ignore[attr-defined]


def test_both_paths_stop_at_the_same_volume() -> None:
    assert cpu_loops._EXHAUSTED == torch_greedy.EXHAUSTED
