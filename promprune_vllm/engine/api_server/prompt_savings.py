"""Computes from vLLM's configuration what pruning saves: bytes of KV cache and FLOPs of the prefill."""

from __future__ import annotations

from typing import Any

from promprune_vllm.core.savings import Decoder, read_decoder, saved_blocks
from promprune_vllm.engine.compat import parts, verdict
from promprune_vllm.metrics.recorder import Saving

_PLAIN_CACHES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc")
"""KV cache types that store one element per number, without scales or padding."""


class Savings:
    """Computes what pruned prompts of one engine save.

    Args:
        vllm_config: The engine's. Its block size may change until the engine has started, so it is read each time.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._cache = vllm_config.cache_config
        self._bytes_per_token = bytes_per_token(vllm_config)
        self._decoder = decoder(vllm_config)

    @property
    def supported(self) -> bool:
        """Whether bytes and FLOPs can be computed for this model."""
        return self._bytes_per_token is not None and self._decoder is not None

    def of_prompt(self, before: int, after: int) -> Saving | None:
        """Return what a prompt pruned from ``before`` to ``after`` tokens saves; ``None`` if not ``supported``."""
        if self._bytes_per_token is None or self._decoder is None:
            return None
        block = int(self._cache.block_size)
        return Saving(
            kv_bytes=saved_blocks(before, after, block) * block * self._bytes_per_token,
            flops=self._decoder.prefill_flops(before) - self._decoder.prefill_flops(after),
        )


def bytes_per_token(vllm_config: Any) -> int | None:
    """Return the bytes of KV cache that one token takes over all layers and ranks, or ``None`` if that varies."""
    sizes = decoder(vllm_config)
    if sizes is None:
        return None
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype, resolve_kv_cache_dtype_string

    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    stored = resolve_kv_cache_dtype_string(cache.cache_dtype, model)
    if stored not in _PLAIN_CACHES or cache.kv_cache_dtype_skip_layers:
        return None
    # If there are more ranks than KV heads, heads are repeated.
    heads = model.get_num_kv_heads(parallel) * parallel.tensor_parallel_size
    numbers = sizes.attention_layers * heads * model.get_head_size() * 2  # keys and values
    return int(numbers * kv_cache_dtype_str_to_dtype(stored, model).itemsize)


def decoder(vllm_config: Any) -> Decoder | None:
    """Return the sizes of the language model, or ``None`` if the formulas do not cover it."""
    model = vllm_config.model_config
    if verdict.current().is_off(parts.SAVINGS) or model.use_mla:
        return None
    sizes = read_decoder(model.hf_text_config.to_dict())
    if sizes is None:
        return None
    # vLLM knows more kinds of experts and of layers with a state than the formulas do.
    known = (model.is_moe, model.is_hybrid) == (sizes.experts > 1, sizes.linear.count > 0)
    return sizes if known else None
