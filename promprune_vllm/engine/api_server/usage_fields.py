"""Adds ``usage.visual_tokens`` to replies, wherever vLLM builds a usage; only for requests with images."""

from __future__ import annotations

from typing import Any

from promprune_vllm.engine import patches
from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.server.usage import USAGE_FIELD, current_usage, recording


def prepare_usage_types(original: Any) -> Any:
    """Wrap the constructor of ``OnlineRenderer``, which API servers and ``vllm run-batch`` use, not ``LLM``."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        extend_usage_types()

    return init


def extend_usage_types() -> None:
    """Add our field to all of vLLM's usage types. Idempotent."""
    seams.require(parts.USAGE)
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicStreamEvent, AnthropicUsage
    from vllm.entrypoints.pooling.scoring.protocol import RerankResponse, RerankUsage

    _allow_more(AnthropicUsage, AnthropicMessagesResponse, AnthropicStreamEvent)
    _allow_more(RerankUsage, RerankResponse)
    patches.install(Stage.REPLIES)


def _allow_more(usage: Any, *holders: Any) -> None:
    """Allow extra fields in a usage type, as vLLM's other usage types do."""
    if usage.model_config.get("extra") != "allow":
        usage.model_config["extra"] = "allow"
        for model in (usage, *holders):
            model.model_rebuild(force=True)  # the holders have a compiled copy of the usage type


def fill_in_usage(original: Any) -> Any:
    """Wrap the constructor of a usage. Validation does not call it, so a usage read from JSON stays unchanged."""

    def init(self: Any, **data: Any) -> None:
        images = current_usage()
        if images is not None:
            data[USAGE_FIELD] = images.usage()
        original(self, **data)

    return init


def count_second_try(original: Any) -> Any:
    """Wrap the constructor of a prompt's token details, whose count by modality vLLM takes from the first try."""

    def init(self: Any, **data: Any) -> None:
        images = current_usage()
        if images is not None and images.second_lengths and data.get("multimodal_tokens"):
            data["multimodal_tokens"] = dict(images.second_lengths)
        original(self, **data)

    return init


def record_batch_line(original: Any) -> Any:
    """Wrap the function that answers one line of a batch: record its images. Over HTTP, a middleware does this."""

    async def run_request(*args: Any, **kwargs: Any) -> Any:
        with recording():
            return await original(*args, **kwargs)

    return run_request
