"""What pruning saves per prompt: KV cache blocks, and floating-point operations of the prefill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a decoder-only language model with equal layers, dense or of experts.

    Args:
        layers: Number of decoder layers.
        hidden: Width of the residual stream.
        heads: Attention heads per layer.
        kv_heads: Key and value heads per layer.
        head: Width of a head.
        intermediate: Width of the gated MLP, or of each expert.
        experts: Experts per layer; 1 for a dense model.
        used_experts: Experts per layer that a token passes through.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    experts: int = 1
    used_experts: int = 1

    @property
    def weights(self) -> int:
        """Number of weights in the layers: q, k, v and o; gate, up and down of each expert; the router."""
        return self._weights(self.experts)

    def _weights(self, experts: int) -> int:
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.layers * (attention + 3 * self.hidden * self.intermediate * experts + router)

    def prefill_flops(self, tokens: int) -> int:
        """Return the floating-point operations of a prefill of ``tokens`` tokens; a multiply-add counts as two.

        Every token is multiplied once with every weight of the layers, except those of experts that it does not
        pass through. Token i attends to i keys and i values in
        every head. Left out, because pruning does not change them or they are too small to matter: the output
        head (used by one token per prompt), norms, softmax, rotations.
        """
        scores = 2 * self.layers * self.heads * self.head * tokens * (tokens + 1)
        return 2 * self._weights(self.used_experts) * tokens + scores


def feed_forward(text: Mapping[str, Any]) -> dict[str, int] | None:
    """Return ``intermediate``, ``experts`` and ``used_experts`` of a ``Decoder``.

    Args:
        text: The language model's part of config.json, with every default filled in.

    Returns:
        ``None`` unless all layers are dense, or all have the same experts and no shared one.
    """
    # transformers calls Qwen3-VL's `num_experts` by its own name.
    experts = text.get("num_experts") or text.get("num_local_experts")
    if experts is None:
        intermediate = text.get("intermediate_size")
        return {"intermediate": intermediate} if isinstance(intermediate, int) else None
    shared = text.get("shared_expert_intermediate_size") or text.get("n_shared_experts")
    if shared or text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        return None
    sizes = (text.get("moe_intermediate_size"), experts, text.get("num_experts_per_tok"))
    if not all(isinstance(size, int) for size in sizes):
        return None
    return dict(zip(("intermediate", "experts", "used_experts"), sizes, strict=True))


def saved_blocks(before: int, after: int, block_tokens: int) -> int:
    """Return how many fewer KV cache blocks a prompt of ``after`` tokens fills than one of ``before`` tokens."""
    return -(-before // block_tokens) - -(-after // block_tokens)
