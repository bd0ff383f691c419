"""``usage.visual_tokens`` in replies: added where vLLM makes a usage, for requests with images only."""

from __future__ import annotations

from typing import Any

from promprune_vllm.engine.wrapping import wrap
from promprune_vllm.server.told import USAGE_FIELD, told


def install() -> None:
    """Wrap vLLM's usage classes in the API server's process. Idempotent."""
    from vllm.entrypoints.anthropic.protocol import (
        AnthropicMessagesResponse,
        AnthropicStreamEvent,
        AnthropicUsage,
    )
    from vllm.entrypoints.openai.responses.protocol import ResponseUsage
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    if AnthropicUsage.model_config.get("extra") != "allow":  # as the other two have it
        AnthropicUsage.model_config["extra"] = "allow"
        for model in (AnthropicUsage, AnthropicMessagesResponse, AnthropicStreamEvent):
            model.model_rebuild(force=True)  # the latter two hold a compiled copy of the first
    # Validation does not come by here, so a usage read back from JSON keeps what it says.
    for usage in (UsageInfo, ResponseUsage, AnthropicUsage):
        wrap(usage, "__init__", _telling)


def _telling(original: Any) -> Any:
    def init(self: Any, **data: Any) -> None:
        known = told()
        if known is not None:
            data[USAGE_FIELD] = known.usage()
        original(self, **data)

    return init
