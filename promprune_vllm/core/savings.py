"""What a prompt without some of its tokens saves: blocks of KV cache, and arithmetic of the prefill."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a dense decoder-only language model.

    Args:
        layers: Decoder layers.
        hidden: Width of the residual stream.
        heads: Attention heads of one layer.
        kv_heads: Key and value heads of one layer.
        head: Width of a head.
        intermediate: Width of the gated MLP.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int

    @property
    def weights(self) -> int:
        """Number of weights of the layers: the projections q, k, v and o, and the MLP's gate, up and down."""
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def prefill_flops(self, tokens: int) -> int:
        """Return the floating-point operations of a prefill of so many tokens, a multiply-add being two.

        Every token meets every weight of the layers once. Token i meets i keys and i values in every head. Left
        out, as they are the same with fewer tokens or too small to matter: the output head (one token of a prompt
        meets it), norms, softmax, rotations.
        """
        scores = 2 * self.layers * self.heads * self.head * tokens * (tokens + 1)
        return 2 * self.weights * tokens + scores


def saved_blocks(before: int, after: int, block_tokens: int) -> int:
    """Return how many blocks of the KV cache a prompt of ``after`` tokens fills less than one of ``before``."""
    return -(-before // block_tokens) - -(-after // block_tokens)
