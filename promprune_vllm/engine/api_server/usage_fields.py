"""``usage.visual_tokens`` in replies: added where vLLM makes a usage, for requests with images only."""

from __future__ import annotations

from typing import Any

from promprune_vllm.engine import patches
from promprune_vllm.engine.compat import versions
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.server.usage import USAGE_FIELD, current_usage, recording


def extend_replies(original: Any) -> Any:
    """Wrap what API servers and ``vllm run-batch`` make before they answer, and offline programs never do."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        extend_usages()

    return init


def extend_usages() -> None:
    """Let every usage of vLLM's carry our field. Idempotent."""
    versions.require_names(versions.USAGE_NAMES)
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicStreamEvent, AnthropicUsage
    from vllm.entrypoints.pooling.scoring.protocol import RerankResponse, RerankUsage

    _allow_more(AnthropicUsage, AnthropicMessagesResponse, AnthropicStreamEvent)
    _allow_more(RerankUsage, RerankResponse)
    patches.install(Stage.REPLIES)


def _allow_more(usage: Any, *holders: Any) -> None:
    """Let a usage carry our field, as vLLM's other usages may."""
    if usage.model_config.get("extra") != "allow":
        usage.model_config["extra"] = "allow"
        for model in (usage, *holders):
            model.model_rebuild(force=True)  # the holders have a compiled copy of the usage


def fill_in_usage(original: Any) -> Any:
    """Wrap the making of a usage. Validation does not come here: a usage read from JSON keeps what it says."""

    def init(self: Any, **data: Any) -> None:
        known = current_usage()
        if known is not None:
            data[USAGE_FIELD] = known.usage()
        original(self, **data)

    return init


def listen(original: Any) -> Any:
    """Wrap what answers one line of a batch: over HTTP, a middleware does this."""

    async def run_request(*args: Any, **kwargs: Any) -> Any:
        with recording():
            return await original(*args, **kwargs)

    return run_request
