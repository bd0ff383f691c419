"""The parts that families of towers are made of, alone: layouts of attention, patches that become tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MMEncoderAttention

from promprune_vllm import Need
from promprune_vllm.engine.worker.patch_merge import PatchMerge
from promprune_vllm.engine.worker.tower_hooks import ClassToken, attention_features, encoder_rows
from tests.engine.family_engine import FAMILY_ENGINES, shared_engine

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES
BOTH = Need.SALIENCY | Need.KEYS
IMAGES, PATCHES = 3, 17


@pytest.fixture
def attention(models: dict[str, Path]) -> MMEncoderAttention:
    """vLLM's attention of a tower, as it made it."""
    found = shared_engine("qwen2_vl", models["qwen2_vl"]).model.visual.blocks[-1].attn.attn
    assert isinstance(found, MMEncoderAttention)
    return found


def heads(attention: MMEncoderAttention, images: int = IMAGES, kv_heads: int | None = None) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    sizes = (attention.num_heads, *[kv_heads or attention.num_heads] * 2)
    return tuple(torch.randn(images, PATCHES, number, attention.head_size) for number in sizes)


def maps(attention: Any, q: Tensor, k: Tensor) -> Tensor:
    """Attention maps ``(B, H, S, S)``, from the definition."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return (torch.einsum("bqhd,bkhd->bhqk", q, k) * attention.scale).softmax(dim=-1)


def features(attention: Any, call: Any, **options: Any) -> dict[str, list[Tensor]]:
    layer = SimpleNamespace(attn=attention)  # without tp_size: every rank has all heads
    with torch.inference_mode(), attention_features(layer, BOTH, **options) as captured:
        call(attention)
    assert not attention._forward_pre_hooks
    return captured


def flat(values: Tensor) -> Tensor:
    return values.flatten(2)


@pytest.mark.parametrize("place", [None, *ClassToken])
@pytest.mark.parametrize("form", ["positional, heads flat", "positional, heads apart", "by name"])
def test_every_layout_of_a_call_gives_the_attention_of_the_definition(
    attention: MMEncoderAttention, place: ClassToken | None, form: str
) -> None:
    q, k, v = heads(attention)

    def call(module: MMEncoderAttention) -> None:
        if form == "by name":
            module(query=q, key=k, value=v)
        else:
            shaped = (q, k, v) if "apart" in form else map(flat, (q, k, v))
            module(*shaped)

    found = features(attention, call, class_token=place)
    whole = maps(attention, q, k)  # (B, H, S, S)
    saliency, keys = whole.mean(dim=(1, 2)), k.mean(dim=2)
    if place is not None:
        row = 0 if place is ClassToken.FIRST else PATCHES - 1
        rest = [i for i in range(PATCHES) if i != row]
        saliency, keys = whole[:, :, row, rest].mean(dim=1), keys[:, rest]
    torch.testing.assert_close(torch.stack(found["saliency"]), saliency, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.stack(found["keys"]), keys)


def test_images_of_different_sizes_in_one_sequence(attention: MMEncoderAttention) -> None:
    q, k, v = heads(attention, images=1)
    counts = [5, 12]

    def call(module: MMEncoderAttention) -> None:
        lengths = torch.tensor([0, 5, 17], dtype=torch.int32)
        module(query=q, key=k, value=v, cu_seqlens=lengths, max_seqlen=torch.tensor(12))

    found = features(attention, call, counts=counts)
    for i, part in enumerate((slice(0, 5), slice(5, 17))):
        truth = maps(attention, q[:, part], k[:, part]).mean(dim=(1, 2))[0]
        torch.testing.assert_close(found["saliency"][i], truth, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["keys"][i], k[0, part].mean(dim=1))


@pytest.mark.parametrize("place", [None, ClassToken.FIRST])
def test_several_heads_may_share_keys(attention: MMEncoderAttention, place: ClassToken | None) -> None:
    grouped = torch.nn.Module()  # a hook needs a module; the arithmetic behind it is vLLM's and not looked at
    grouped.num_heads, grouped.num_kv_heads = attention.num_heads, 1
    grouped.head_size, grouped.scale = attention.head_size, attention.scale
    grouped.forward = lambda *_: None
    q, k, v = heads(attention, kv_heads=1)
    found = features(grouped, lambda module: module(q, k, v), class_token=place)
    whole = maps(attention, q, k)
    truth = whole.mean(dim=(1, 2)) if place is None else whole[:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(torch.stack(found["saliency"]), truth, atol=1e-5, rtol=1e-4)


def test_no_hook_is_there_for_what_nobody_needs(attention: MMEncoderAttention) -> None:
    layer = SimpleNamespace(attn=attention)
    for needs in (Need.PROJECTED, Need.PROJECTED | Need.TEXT | Need.ENCODER):
        with attention_features(layer, needs) as captured:
            assert not attention._forward_pre_hooks
        assert captured == {}
    with encoder_rows(attention, Need.PROJECTED | BOTH) as rows:
        assert not attention._forward_pre_hooks
    assert rows == []


def patches(height: int = 4, width: int = 6, channels: int = 5) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(height * width, channels)


def test_pixel_shuffle_puts_the_patches_of_a_square_side_by_side() -> None:
    """As InternVL does, in both of vLLM's classes."""
    from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
    from vllm.model_executor.models.internvl import InternVLChatModel

    rows = patches(6, 6)
    ours = PatchMerge(2, in_raster_order=True).side_by_side(rows, columns=6)
    for model in (InternVLChatModel, InternS1ForConditionalGeneration):
        shuffled = model.pixel_shuffle(SimpleNamespace(ps_version="v2"), rows.view(1, 6, 6, -1), 0.5)
        assert torch.equal(shuffled.reshape(9, -1), ours)


def test_average_pool_is_the_mean_of_a_square() -> None:
    """As Gemma 3 does."""
    rows = patches()
    pooled = torch.nn.functional.avg_pool2d(rows.T.view(1, 5, 4, 6), 2).flatten(2)[0].T
    torch.testing.assert_close(PatchMerge(2, in_raster_order=True).mean(rows, columns=6), pooled)


def test_concatenation_takes_the_patches_that_follow_each_other() -> None:
    """As Qwen-VL does, whose patches are ordered for it."""
    rows, merge = patches(), PatchMerge(2)
    assert torch.equal(merge.side_by_side(rows, columns=6), rows.view(6, -1))
    torch.testing.assert_close(merge.mean(rows, columns=6), rows.view(6, 4, -1).mean(dim=1))


def test_a_convolution_sees_the_same_squares() -> None:
    """As GLM-V has it: a kernel as large as its stride is a matrix over a square's patches."""
    rows = patches()
    convolution = torch.nn.Conv2d(5, 7, kernel_size=2, stride=2)
    truth = convolution(rows.T.view(1, 5, 4, 6)).flatten(2)[0].T
    squares = PatchMerge(2, in_raster_order=True).squares(rows, columns=6)
    matrix = convolution.weight.permute(2, 3, 1, 0).reshape(-1, 7)
    torch.testing.assert_close(squares.flatten(1) @ matrix + convolution.bias, truth)
