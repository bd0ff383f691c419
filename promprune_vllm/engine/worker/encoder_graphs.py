"""The encoder's CUDA graphs and compilation, where the user has turned them on.

A captured graph replays the vision tower without the model's ``embed_multimodal``: nothing would be pruned, and no
saliency captured. Images that keep all their tokens use the graphs, and a batch with a pruned image does not. With
the feature cache, none does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from promprune_vllm.core.budget import KINDS
from promprune_vllm.engine.keys import COUNTS, IDENTITY, field_of

logger = logging.getLogger("vllm.promprune")


def leave_out_pruned(original: Any) -> Any:
    """Wrap the replay of the encoder's graphs: none for a batch with a pruned image, as if it did not fit."""

    def execute(self: Any, mm_kwargs: dict[str, Any]) -> Any:
        # vLLM keeps the counts on the CPU, so that reading them waits for nothing.
        for kind in KINDS:
            counts = mm_kwargs.get(field_of(kind, COUNTS))
            pruned = counts is not None and any(kept < total for total, kept, _ in counts.tolist())
            if pruned or field_of(kind, IDENTITY) in mm_kwargs:  # the feature cache needs what is captured
                return None
        embeddings = original(self, mm_kwargs)
        # A process may also run another engine, whose model is vLLM's own.
        as_sent = getattr(self.model, "as_sent", None)
        return embeddings if as_sent is None or embeddings is None else as_sent(embeddings)

    return execute


def keep_eager(modules: Iterable[Any]) -> None:
    """Exempt modules from compilation: a compiled module ignores the hooks that capture features."""
    for module in modules:
        if hasattr(module, "do_not_compile"):
            module.do_not_compile = True


def log_cost(compilation_config: Any) -> None:
    """Say in one line what pruned images cannot use of what the user has turned on."""
    costs = {
        "cudagraph_mm_encoder": "batches with a pruned image are encoded without CUDA graphs",
        "compile_mm_encoder": "the block that saliency is computed from, and the merger, are not compiled",
    }
    told = [f"{cost} ({option})" for option, cost in costs.items() if getattr(compilation_config, option, False)]
    if told:
        logger.warning("PromPrune: %s.", "; ".join(told))
