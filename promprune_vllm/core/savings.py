"""What pruning saves per prompt: KV cache blocks, and floating-point operations of the prefill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LINEAR = "linear_attention"
_GLM_EXPERTS = ("glm4_moe", "glm4v_moe_text")


@dataclass(frozen=True, slots=True)
class LinearLayers:
    """The layers with a state of fixed size (Gated DeltaNet) in a decoder that also has layers with attention.

    Args:
        count: Number of layers.
        mixer: Weights of a layer without its MLP: queries, keys, values and gates, convolution, output.
        state: Numbers in a layer's state, which each token reads and updates.
        window: Numbers of the last tokens that a layer keeps for its convolution.
    """

    count: int
    mixer: int
    state: int
    window: int


_NO_LINEAR_LAYERS = LinearLayers(count=0, mixer=0, state=0, window=0)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a decoder-only language model.

    Args:
        layers: Number of decoder layers.
        hidden: Width of the residual stream.
        heads: Attention heads per layer.
        kv_heads: Key and value heads per layer.
        head: Width of a head.
        intermediate: Width of the gated MLP, or of each expert.
        experts: Experts per layer; 1 for a dense model.
        used_experts: Experts per layer that a token passes through.
        shared: Width of the expert that all tokens pass through; 0 if there is none.
        shared_gate: Whether that expert's output has a gate.
        dense: Number of layers, the first ones, with a plain MLP in place of experts.
        dense_intermediate: Width of that MLP.
        gated: Whether a layer's attention has a gate for its output.
        linear: Those of the layers that have no KV cache.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    experts: int = 1
    used_experts: int = 1
    shared: int = 0
    shared_gate: bool = False
    dense: int = 0
    dense_intermediate: int = 0
    gated: bool = False
    linear: LinearLayers = _NO_LINEAR_LAYERS

    @property
    def attention_layers(self) -> int:
        """Number of layers that have a KV cache."""
        return self.layers - self.linear.count

    @property
    def weights(self) -> int:
        """Number of weights in the layers, without norms and biases."""
        return self._weights(self.experts)

    def _weights(self, experts: int) -> int:
        attention = self.hidden * self.head * ((2 + self.gated) * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden * (self.intermediate * experts + self.shared)
        router = self.hidden * (self.experts + self.shared_gate) if self.experts > 1 else 0
        dense = 3 * self.hidden * self.dense_intermediate
        mixers = self.attention_layers * attention + self.linear.count * self.linear.mixer
        return (self.layers - self.dense) * (mlp + router) + self.dense * dense + mixers

    def prefill_flops(self, tokens: int) -> int:
        """Return the floating-point operations of a prefill of ``tokens`` tokens; a multiply-add counts as two.

        Every token is multiplied once with every weight of the layers, except those of experts that it does not
        pass through. Token i attends to i keys and i values in every head. In a linear layer, it reads the state
        twice (with its key and its query) and updates it once. Left out, because pruning does not change them or
        they are too small to matter: the output head (used by one token per prompt), norms, softmax, rotations,
        the decay of states.
        """
        scores = 2 * self.attention_layers * self.heads * self.head * tokens * (tokens + 1)
        states = 6 * self.linear.count * self.linear.state * tokens
        return 2 * self._weights(self.used_experts) * tokens + scores + states


def read_decoder(text: Mapping[str, Any]) -> Decoder | None:
    """Return the sizes of a language model.

    Args:
        text: Its part of config.json, with every default filled in.

    Returns:
        ``None`` if its MLPs or its layers are of kinds that the formulas do not cover.
    """
    feed_forward = _feed_forward(text)
    if feed_forward is None or not {_LINEAR, "full_attention"}.issuperset(text.get("layer_types") or ()):
        return None
    try:
        return _decoder(text, feed_forward)
    except (KeyError, TypeError):  # a size has another name, or one value per layer: another kind of model
        return None


def _decoder(text: Mapping[str, Any], feed_forward: Mapping[str, Any]) -> Decoder:
    heads, hidden, linear = int(text["num_attention_heads"]), int(text["hidden_size"]), _linear_layers(text)
    return Decoder(
        layers=int(text["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head=int(text.get("head_dim") or hidden // heads),
        # vLLM's default, too: the models with linear layers have this gate unless they say otherwise.
        gated=linear.count > 0 and bool(text.get("attn_output_gate", True)),
        linear=linear,
        **feed_forward,
    )


def _feed_forward(text: Mapping[str, Any]) -> dict[str, Any] | None:
    sizes = _glm_experts(text) if text.get("model_type") in _GLM_EXPERTS else _experts(text)
    return sizes if sizes is not None and all(isinstance(size, int) for size in sizes.values()) else None


def _glm_experts(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of GLM-4.5's layers. DeepSeek's have the same names, but another attention."""
    width, shared = text.get("moe_intermediate_size"), text.get("n_shared_experts") or 0
    return {
        "intermediate": width,
        "experts": text.get("n_routed_experts"),
        "used_experts": text.get("num_experts_per_tok"),
        "shared": width * shared if isinstance(width, int) else None,
        "dense": text.get("first_k_dense_replace"),
        "dense_intermediate": text.get("intermediate_size"),
    }


def _experts(text: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the sizes of a dense model's layers, or of Qwen's with experts."""
    # transformers calls Qwen3-VL's `num_experts` by its own name.
    experts = text.get("num_experts") or text.get("num_local_experts")
    if experts is None:
        return {"intermediate": text.get("intermediate_size")}
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1 or text.get("n_shared_experts"):
        return None  # layers differ, or a shared expert of unknown width
    shared = text.get("shared_expert_intermediate_size") or 0
    return {
        "intermediate": text.get("moe_intermediate_size"),
        "experts": experts,
        "used_experts": text.get("num_experts_per_tok"),
        "shared": shared,
        "shared_gate": bool(shared),
    }


def _linear_layers(text: Mapping[str, Any]) -> LinearLayers:
    """Return the Gated DeltaNet layers of Qwen3-Next and Qwen3.5."""
    count = list(text.get("layer_types") or ()).count(_LINEAR)
    if not count:
        return _NO_LINEAR_LAYERS
    key_head, value_head = text["linear_key_head_dim"], text["linear_value_head_dim"]
    key, value = key_head * text["linear_num_key_heads"], value_head * text["linear_num_value_heads"]
    projections = text["hidden_size"] * (2 * key + 3 * value + 2 * text["linear_num_value_heads"])
    channels, kernel = 2 * key + value, text["linear_conv_kernel_dim"]
    return LinearLayers(count, projections + channels * kernel, key_head * value, channels * (kernel - 1))


def saved_blocks(before: int, after: int, block_tokens: int) -> int:
    """Return how many fewer KV cache blocks a prompt of ``after`` tokens fills than one of ``before`` tokens."""
    return -(-before // block_tokens) - -(-after // block_tokens)
