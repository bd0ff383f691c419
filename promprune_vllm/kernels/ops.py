"""The public operations. Methods import from here; which implementation runs is decided here."""

from promprune_vllm.kernels.torch_greedy import facility_location, farthest_points, greedy_dpp
from promprune_vllm.kernels.torch_ops import (
    complement,
    cosine_gram,
    cross_cosine,
    descending_order,
    finite_rows,
    max_min_select,
    merge_rows,
    min_max,
    received_attention,
    settled,
    share_entropy,
    spectral_entropy,
    token_keys,
)

__all__ = [
    "complement",
    "cosine_gram",
    "cross_cosine",
    "descending_order",
    "facility_location",
    "farthest_points",
    "finite_rows",
    "greedy_dpp",
    "max_min_select",
    "merge_rows",
    "min_max",
    "received_attention",
    "settled",
    "share_entropy",
    "spectral_entropy",
    "token_keys",
]
