"""``usage.visual_tokens`` in replies: added where vLLM makes a usage, for requests with images only."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from promprune_vllm.engine import checks
from promprune_vllm.engine.wrapping import wrap
from promprune_vllm.server.told import USAGE_FIELD, listening, told

_BATCHES = ("vllm.entrypoints.launchers.run_batch", "vllm.entrypoints.openai.run_batch")
"""The module of ``vllm run-batch``, in vLLM 0.32 and before; it is loaded only by that command."""
_DECISIONS = "vllm.entrypoints.generate.structured_decisions.protocol"
"""Not in every minor."""


def install() -> None:
    """Have usages tell of images in every process that answers requests. Idempotent."""
    checks.require_names({f"{checks.ONLINE}.__init__": ("renderer",)})
    from vllm.renderers.online_renderer import OnlineRenderer

    wrap(OnlineRenderer, "__init__", _extending_replies)


def _extending_replies(original: Any) -> Any:
    """Wrap what API servers and ``vllm run-batch`` make before they answer, and offline programs never do."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        extend_usages()
        for name in _BATCHES:
            module = sys.modules.get(name)
            if module is not None and hasattr(module, "run_request"):
                wrap(module, "run_request", _listening)

    return init


def extend_usages() -> None:
    """Wrap vLLM's usage classes. Idempotent."""
    checks.require_names(checks.USAGE_NAMES)
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicStreamEvent, AnthropicUsage
    from vllm.entrypoints.openai.responses.protocol import ResponseUsage
    from vllm.entrypoints.pooling.scoring.protocol import RerankResponse, RerankUsage
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    _allow_more(AnthropicUsage, AnthropicMessagesResponse, AnthropicStreamEvent)
    _allow_more(RerankUsage, RerankResponse)
    usages = [UsageInfo, ResponseUsage, AnthropicUsage, RerankUsage]
    if importlib.util.find_spec(_DECISIONS) is not None:
        from vllm.entrypoints.generate.structured_decisions.protocol import DecisionUsage

        usages.append(DecisionUsage)
    # Validation does not come by here, so a usage read back from JSON keeps what it says.
    for usage in usages:
        wrap(usage, "__init__", _telling)


def _allow_more(usage: Any, *holders: Any) -> None:
    """Let a usage carry our field, as vLLM's other usages may."""
    if usage.model_config.get("extra") != "allow":
        usage.model_config["extra"] = "allow"
        for model in (usage, *holders):
            model.model_rebuild(force=True)  # the holders have a compiled copy of the usage


def _telling(original: Any) -> Any:
    def init(self: Any, **data: Any) -> None:
        known = told()
        if known is not None:
            data[USAGE_FIELD] = known.usage()
        original(self, **data)

    return init


def _listening(original: Any) -> Any:
    """Wrap what answers one line of a batch: over HTTP, a middleware does this."""

    async def run_request(*args: Any, **kwargs: Any) -> Any:
        with listening():
            return await original(*args, **kwargs)

    return run_request
