"""Nothing in a selection on the CUDA path asks for a value: tensors that have none go all the way through."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promprune_vllm import VisionFeatures, methods, select, select_many
from promprune_vllm.core.registry import get_method
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.selected_tokens import select_tokens
from promprune_vllm.kernels import ops, triton_attention, triton_gram, triton_greedy, triton_ops


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels that compute nothing, since there is nothing to compute on."""
    seen: list[Any] = []
    for module in (triton_gram, triton_greedy, triton_attention):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: seen.append(kernel))
    monkeypatch.setattr(ops, "_path", lambda _: ("Triton", triton_ops, ""))
    return seen


def _features(n: int) -> VisionFeatures:
    x = torch.empty(n, 96, device="meta", dtype=torch.bfloat16)
    line = torch.empty(n, device="meta")
    return VisionFeatures(projected=x, grid=(1, 1, n), saliency=line, encoder=x, keys=x, text=x[:7])


@pytest.mark.parametrize("name", methods())
def test_every_method_chooses_without_the_host(name: str, launches: list[Any]) -> None:
    for n, keep in ((90, 12), (900, 80)):
        selection = select(_features(n), keep, name)
        assert selection.indices.shape == (keep,)
        assert selection.indices.device.type == "meta"


def test_promprune_is_kernels_from_end_to_end(launches: list[Any]) -> None:
    image = EncodedImage.whole(torch.empty(576, 96, device="meta"), _features(576))
    rows, places = select_tokens(image, 64, get_method("promprune")).rows(lambda rows: rows)
    assert (rows.shape, places.shape) == ((64, 96), (64,))
    assert {kernel.__name__ for kernel in launches} == {"_prepare", "_gram", "_square", "_nearest", "_panel"}
    triton_ops.received_attention(*torch.empty(2, 30, 2, 80, device="meta"), 0.1)


def test_crops_neither_and_equal_ones_share_a_launch(launches: list[Any]) -> None:
    crops = [_features(n) for n in (90, 90, 70, 90)]
    assert [len(each.indices) for each in select_many(crops, (12, 11, 5, 1))] == [12, 11, 5, 1]
    assert [kernel.__name__ for kernel in launches].count("_panel") == 2


def test_very_many_tokens_neither(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "DENSE", 80)
    monkeypatch.setattr(triton_ops, "SIDE", 85)
    assert select(_features(90), 12).indices.shape == (12,)


def test_a_value_asked_for_is_noticed(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    choose = triton_greedy.greedy_dpp
    monkeypatch.setattr(
        triton_greedy,
        "greedy_dpp",
        lambda gram, order, given, keep: choose(gram, order, given + int(given[0]), keep),
    )
    with pytest.raises(RuntimeError, match="meta"):
        select(_features(90), 12)
