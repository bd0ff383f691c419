"""Hooks that capture intermediate values of a vision tower, without making it return attention maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce

from promprune_vllm.core.features import Need
from promprune_vllm.kernels.ops import received_attention


@contextmanager
def clip_attention(attention: Any, needs: Need) -> Iterator[dict[Need, Tensor]]:
    """Capture features from one CLIP attention layer inside the block.

    Args:
        attention: vLLM's ``CLIPAttention``. Its inner ``attn`` is called with q, k, v of
            ``(B, 1 + N, heads * head_dim)``; the heads are those of this tensor-parallel rank.
        needs: ``SALIENCY``, ``KEYS``, both or neither; other features are ignored.

    Yields:
        A dict that the layer's call fills, each value a mean over all heads of all ranks, float32: ``SALIENCY``
        ``(B, N)``, the attention that CLS pays to every patch, softmax over CLS and patches, without the CLS
        column and not renormalized; ``KEYS`` ``(B, N, head_dim)``.
    """
    captured: dict[Need, Tensor] = {}

    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        q, k = args[0], args[1]
        heads = attention.num_heads_per_partition
        keys = k.float().reshape(*k.shape[:2], heads, -1)  # (B, 1 + N, H, d)
        if Need.SALIENCY in needs:
            # Only the query of CLS: O(N) memory, and the tower keeps its fast attention kernel.
            cls = q[:, 0].float().reshape(q.shape[0], heads, -1)  # (B, H, d)
            weights = torch.softmax(torch.einsum("bhd,bnhd->bhn", cls, keys) * attention.scale, dim=-1)
            captured[Need.SALIENCY] = _mean_over_ranks(weights[:, :, 1:].mean(dim=1), attention.tp_size)
        if Need.KEYS in needs:
            captured[Need.KEYS] = _mean_over_ranks(keys[:, 1:].mean(dim=2), attention.tp_size)

    with _pre_hook(attention.attn, hook):
        yield captured


@contextmanager
def patch_attention(attention: Any, needs: Need, counts: Sequence[int]) -> Iterator[dict[str, list[Tensor]]]:
    """Capture features from one attention layer without a CLS token inside the block.

    Args:
        attention: An attention layer of vLLM's Qwen towers. Its inner ``attn`` is called with query and key of
            ``(1, P, heads, head_dim)``, the patches of all images one after the other; the heads are those of this
            tensor-parallel rank.
        needs: ``SALIENCY``, ``KEYS``, both or neither; other features are ignored.
        counts: Patches of each image.

    Yields:
        A dict that the layer's call fills, one tensor per image, each a mean over all heads of all ranks, float32:
        ``saliency`` ``(P_i,)``, the attention that a patch receives from all patches of its image; ``keys``
        ``(P_i, head_dim)``.
    """
    captured: dict[str, list[Tensor]] = {}

    def hook(_: Any, __: Any, kwargs: dict[str, Tensor]) -> None:
        q, k = (
            torch.split(kwargs[name].flatten(0, 1), list(counts)) for name in ("query", "key")
        )  # (P_i, H, d) each
        scale = attention.attn.scale
        if Need.SALIENCY in needs:
            mean = [received_attention(queries, keys, scale) for queries, keys in zip(q, k, strict=True)]
            captured["saliency"] = [_mean_over_ranks(values, attention.tp_size) for values in mean]
        if Need.KEYS in needs:
            captured["keys"] = [_mean_over_ranks(keys.float().mean(dim=1), attention.tp_size) for keys in k]

    with _pre_hook(attention.attn, hook, with_kwargs=True):
        yield captured


@contextmanager
def inputs_of(module: Any) -> Iterator[list[Tensor]]:
    """Collect the first argument of every call of a module inside the block."""
    inputs: list[Tensor] = []
    with _pre_hook(module, lambda _, args: inputs.append(args[0])):
        yield inputs


@contextmanager
def _pre_hook(module: Any, hook: Any, *, with_kwargs: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
    try:
        yield
    finally:
        handle.remove()


def _mean_over_ranks(mean: Tensor, ranks: int) -> Tensor:
    # Without this, each rank would select by its own heads, and the ranks would keep different tokens.
    return tensor_model_parallel_all_reduce(mean) / ranks if ranks > 1 else mean
