"""Nothing in a selection on the CUDA path asks for a value: tensors that have none go all the way through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from promprune_vllm import VisionFeatures, methods, select, select_many
from promprune_vllm.core.registry import get_method
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.selected_tokens import select_tokens
from promprune_vllm.engine.worker.selection_metrics import SelectionMetrics
from promprune_vllm.kernels import entropy_chain, ops, triton_attention, triton_gram, triton_greedy, triton_ops
from tests.waits import METHODS_THAT_WAIT, NoWaits, Wait


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels that compute nothing, since there is nothing to compute on."""
    seen: list[Any] = []
    for module in (triton_gram, triton_greedy, triton_attention):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: seen.append(kernel))
    monkeypatch.setattr(ops, "_path", lambda _: ("Triton", triton_ops, ""))
    entropy_chain._coefficients(torch.device("meta"))  # as ``warm_up`` does at start-up
    return seen


def _features(n: int, frames: int = 1) -> VisionFeatures:
    x = torch.empty(n, 96, device="meta", dtype=torch.bfloat16)
    line = torch.empty(n, device="meta")
    return VisionFeatures(projected=x, grid=(frames, 1, n // frames), saliency=line, encoder=x, keys=x, text=x[:7])


@pytest.mark.parametrize("name", methods())
def test_every_method_chooses_without_the_host(name: str, launches: list[Any]) -> None:
    solver = [each for (method, option), each in METHODS_THAT_WAIT.items() if method == name and not option]
    for n, keep in ((90, 12), (900, 80)):
        with NoWaits(solver):
            selection = select(_features(n, frames=10 if methods()[name].over_frames else 1), keep, name)
        assert selection.indices.shape == (keep,)
        assert selection.indices.device.type == "meta"


@pytest.mark.parametrize(("name", "option"), METHODS_THAT_WAIT)
def test_what_may_wait_does(name: str, option: str, launches: list[Any]) -> None:
    options = {option: True} if option else {}
    with NoWaits(), pytest.raises(Wait, match=METHODS_THAT_WAIT[name, option]):
        select(_features(90), 12, name, **options)


def test_promprune_is_kernels_from_end_to_end(launches: list[Any]) -> None:
    image = EncodedImage.whole(torch.empty(576, 96, device="meta"), _features(576))
    with NoWaits():
        rows, places = select_tokens(image, 64, get_method("promprune")).rows(lambda rows: rows)
    assert (rows.shape, places.shape) == ((64, 96), (64,))
    assert {kernel.__name__ for kernel in launches} == {"_prepare", "_gram", "_square", "_nearest", "_panel"}
    triton_ops.received_attention(*torch.empty(2, 30, 2, 80, device="meta"), 0.1)


def test_crops_neither_and_equal_ones_share_a_launch(launches: list[Any]) -> None:
    crops = [_features(n) for n in (90, 90, 70, 90)]
    with NoWaits():
        assert [len(each.indices) for each in select_many(crops, (12, 11, 5, 1))] == [12, 11, 5, 1]
    assert [kernel.__name__ for kernel in launches].count("_panel") == 2


def test_very_many_tokens_neither(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "DENSE", 80)
    monkeypatch.setattr(triton_ops, "SIDE", 85)
    with NoWaits():
        assert select(_features(90), 12).indices.shape == (12,)


def test_a_value_asked_for_is_noticed(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    choose = triton_greedy.greedy_dpp
    monkeypatch.setattr(
        triton_greedy,
        "greedy_dpp",
        lambda gram, order, given, *rest: choose(gram, order, given + int(given[0]), *rest),
    )
    with pytest.raises(RuntimeError, match="meta"):
        select(_features(90), 12)


@pytest.mark.cuda
def test_on_a_gpu_an_image_is_selected_and_measured_without_a_wait(tmp_path: Path) -> None:
    recorder = pytest.importorskip("promprune_vllm.metrics.recorder").Recorder(str(tmp_path), "demo")
    device = torch.device("cuda")
    x = torch.randn(576, 1024, device=device, dtype=torch.bfloat16)
    features = VisionFeatures(projected=x, grid=(1, 24, 24), saliency=torch.rand(576, device=device))
    metrics, method = SelectionMetrics(device, recorder), get_method("promprune")

    def encode() -> None:
        with metrics.measure_time("promprune", "choose"):
            selected = select_tokens(EncodedImage.whole(x, features), 64, method)
        with metrics.measure_time("promprune", "assemble"):
            selected.rows(lambda rows: rows)
        metrics.record_reports("promprune", selected)
        metrics.flush(576)

    encode()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        encode()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    metrics.flush(0)
    assert not metrics._times
    assert not metrics._copied
