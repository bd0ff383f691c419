"""Checks whether the server can honor a request: whether it can prune the model, and allows the method."""

from __future__ import annotations

from typing import Any

from promprune_vllm.core.budget import FIELD
from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.engine import families
from promprune_vllm.engine.api_server import escalation_refusals
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.errors import BudgetError


def admit(renderer: Any, request: PruningRequest) -> None:
    """Raise ``BudgetError`` unless this renderer's model can honor the request."""
    if not (request.sent or request.asks_again):
        return
    name = FIELD if request.sent else ESCALATE_FIELD
    if reason := unsupported_reason(renderer):
        raise BudgetError(
            f"{name} cannot be honored: {served_name(renderer.model_config)} cannot be pruned, {reason}. "
            "Leave the field out, or serve a model that can be pruned.",
            param=name,
            reason="unsupported",
        )
    renderer.mm_processor.check_method(request.method)
    if request.asks_again and (reason := escalation_refusals.unsupported_reason(renderer.model_config)):
        escalation_refusals.refuse(reason)


def unsupported_reason(renderer: Any) -> str | None:
    """Return why a renderer's model cannot be pruned, or ``None`` if it can."""
    from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin

    if renderer.mm_processor is None:
        return "it takes no images"
    reason = families.unsupported_reason(renderer.config)
    if reason is None and not isinstance(renderer.mm_processor, PrunedProcessorMixin):
        reason = "the server runs another implementation of it (--model-impl)"
    return reason


def require_prunable(renderer: Any, verb: str) -> None:
    """Raise ``BudgetError`` if this renderer's model cannot be pruned.

    Args:
        renderer: vLLM's.
        verb: What there is nothing to do with, such as "count".
    """
    if reason := unsupported_reason(renderer):
        model = served_name(renderer.model_config)
        raise BudgetError(f"Nothing to {verb}: {model} cannot be pruned, {reason}.", param="model")


def served_name(model_config: Any) -> str:
    """Return the model's name for clients; they must not see its path."""
    names = model_config.served_model_name
    return str(names) if isinstance(names, str) else str(names[0])
