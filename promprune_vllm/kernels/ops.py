"""The public operations. Methods import from here; which implementation runs is decided here."""

from promprune_vllm.kernels.torch_ops import cosine_gram, greedy_dpp, spectral_entropy, token_keys

__all__ = ["cosine_gram", "greedy_dpp", "spectral_entropy", "token_keys"]
