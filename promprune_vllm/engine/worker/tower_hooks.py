"""Hooks that capture intermediate values of a vision tower, without making it return attention maps.

A method that needs none of a hook's features runs without the hook.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce

from promprune_vllm.core.features import Need
from promprune_vllm.kernels.ops import received_attention


class ClassToken(Enum):
    """Where a tower has its CLS token among an image's patches; ``None`` stands for a tower without one."""

    FIRST = slice(1, None)
    LAST = slice(None, -1)

    @property
    def index(self) -> int:
        """Its index."""
        return 0 if self is ClassToken.FIRST else -1


@contextmanager
def attention_features(
    layer: Any, needs: Need, *, class_token: ClassToken | None = None, counts: Sequence[int] = ()
) -> Iterator[dict[str, list[Tensor]]]:
    """Capture features from one attention layer of a tower inside the block.

    Args:
        layer: The layer. Its ``attn`` is vLLM's ``MMEncoderAttention``, which knows heads, head size and scale.
            It is called with query and key of ``(B, S, H * d)`` or ``(B, S, H, d)``, by position or by name; the
            heads are those of this tensor-parallel rank. ``layer.tp_size`` is the number of ranks that share the
            heads; a layer without it has all heads on each rank.
        needs: ``SALIENCY``, ``KEYS``, both or neither; other features are ignored.
        class_token: Where the CLS token is, if the tower has one.
        counts: Patches of each image, if all images follow each other in a batch of one; else each of the B
            entries of the batch is an image.

    Yields:
        A dict that the layer's call fills, one tensor per image, each a mean over all heads of all ranks, float32.
        ``saliency`` ``(P,)``: with a CLS token, the attention that it pays to every patch, softmax over CLS and
        patches, without the CLS column and not renormalized; otherwise the attention that a patch receives from
        all patches of its image. ``keys`` ``(P, d)``.
    """
    captured: dict[str, list[Tensor]] = {}
    if not needs & (Need.SALIENCY | Need.KEYS):
        yield captured
        return

    def hook(attention: Any, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        q, k = args[:2] if args else (kwargs["query"], kwargs["key"])
        q = q.reshape(*q.shape[:2], attention.num_heads, attention.head_size)
        k = k.reshape(*k.shape[:2], attention.num_kv_heads, attention.head_size)
        if attention.num_kv_heads < attention.num_heads:
            k = k.repeat_interleave(attention.num_heads // attention.num_kv_heads, dim=2)
        if class_token is None:
            features = _received(_split(q, counts), _split(k, counts), attention.scale, needs)
        else:
            features = _paid_by_class_token(q, k, attention.scale, needs, class_token)
        ranks: int = getattr(layer, "tp_size", 1)
        for name, images in features.items():
            captured[name] = [values for part in images for values in _mean_over_ranks(part, ranks)]

    with _pre_hook(layer.attn, hook, with_kwargs=True):
        yield captured


def _split(values: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """Return the ``(P, H, d)`` values of each image."""
    return torch.split(values.flatten(0, 1), list(counts)) if counts else values.unbind()


Features = dict[str, list[Tensor]]
"""Feature name -> tensors of ``(B, P, ...)``; the images of one tensor have equally many patches."""


def _received(q: Sequence[Tensor], k: Sequence[Tensor], scale: float, needs: Need) -> Features:
    """Return the features of images without a CLS token, from their ``(P, H, d)`` queries and keys."""
    features: Features = {}
    if Need.SALIENCY in needs:
        pairs = zip(q, k, strict=True)
        features["saliency"] = [received_attention(queries, keys, scale)[None] for queries, keys in pairs]
    if Need.KEYS in needs:
        features["keys"] = [keys.float().mean(dim=1)[None] for keys in k]
    return features


def _paid_by_class_token(q: Tensor, k: Tensor, scale: float, needs: Need, class_token: ClassToken) -> Features:
    """Return the features of B images, from ``(B, S, H, d)`` queries and keys of CLS and patches."""
    features: Features = {}
    keys = k.float()
    if Need.SALIENCY in needs:
        # Only the query of CLS: O(N) memory, and the tower keeps its fast attention kernel.
        query = q[:, class_token.index].float()  # (B, H, d)
        weights = torch.softmax(torch.einsum("bhd,bnhd->bhn", query, keys) * scale, dim=-1)
        features["saliency"] = [weights[:, :, class_token.value].mean(dim=1)]
    if Need.KEYS in needs:
        features["keys"] = [keys[:, class_token.value].mean(dim=2)]
    return features


@contextmanager
def encoder_rows(projector: Any, needs: Need) -> Iterator[list[Tensor]]:
    """Collect what a projector, or its first module, is called with inside the block, if ``needs`` has ENCODER."""
    inputs: list[Tensor] = []
    if Need.ENCODER not in needs:
        yield inputs
        return
    with _pre_hook(projector, lambda _, args: inputs.append(args[0])):
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
