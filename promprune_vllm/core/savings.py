"""What pruning saves per prompt: KV cache blocks, and floating-point operations of the prefill."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a dense decoder-only language model.

    Args:
        layers: Number of decoder layers.
        hidden: Width of the residual stream.
        heads: Attention heads per layer.
        kv_heads: Key and value heads per layer.
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
        """Number of weights in the layers: the projections q, k, v and o, and the MLP's gate, up and down."""
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def prefill_flops(self, tokens: int) -> int:
        """Return the floating-point operations of a prefill of ``tokens`` tokens; a multiply-add counts as two.

        Every token is multiplied with every weight of the layers once. Token i attends to i keys and i values in
        every head. Left out, because pruning does not change them or they are too small to matter: the output
        head (used by one token per prompt), norms, softmax, rotations.
        """
        scores = 2 * self.layers * self.heads * self.head * tokens * (tokens + 1)
        return 2 * self.weights * tokens + scores


def saved_blocks(before: int, after: int, block_tokens: int) -> int:
    """Return how many fewer KV cache blocks a prompt of ``after`` tokens fills than one of ``before`` tokens."""
    return -(-before // block_tokens) - -(-after // block_tokens)
