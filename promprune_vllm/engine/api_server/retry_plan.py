"""What a prompt asks for in its second try, if its answer may be asked for again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import MAX_BUDGET_TOKENS, Budget, BudgetRequest
from promprune_vllm.core.escalation import Escalation, EscalationRequest
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan, Retry
from promprune_vllm.engine.api_server.pruning_request import PruningRequest


def escalation_in_force(settings: Settings, request: PruningRequest) -> Escalation | None:
    """Return when and how the answer to a request is asked for again, ``None`` for never."""
    wish = request.escalate or EscalationRequest(wanted=settings.escalate is not None)
    return wish.over(settings.escalation())


def plan_retry(
    settings: Settings, request: PruningRequest, plans: Sequence[ImagePlan], order: Sequence[tuple[str, int]]
) -> Retry | None:
    """Return the second try of a prompt, ``None`` if there is none: not wanted, or it would keep no more tokens.

    Args:
        settings: The server's; its limits clamp the second budget.
        request: What the request asks for.
        plans: Those of its images and videos, in order of appearance.
        order: Which of its images and videos these are; see ``PruningRequest``.
    """
    escalation = escalation_in_force(settings, request)
    if escalation is None:
        return None
    policies = settings.media_policy()
    kept = [
        _kept(plan, replace(policies.of(plan.kind), out_of_range="clamp").resolve(escalation.to, plan.total))
        for plan in plans
    ]
    more = sum(kept) - sum(plan.kept for plan in plans)
    if more == 0:
        return None
    budgets = tuple(Budget(tokens=min(tokens, MAX_BUDGET_TOKENS)) for tokens in kept)
    never = EscalationRequest(wanted=False)
    again = replace(request, budget=BudgetRequest(each=budgets), sent=True, escalate=never, order=tuple(order))
    return Retry(escalation, again, more, sent=request.asks_again)


def _kept(plan: ImagePlan, wanted: int) -> int:
    """Return how many tokens an image or a video keeps in the second try: no fewer than in the first."""
    if plan.between and wanted < plan.total:
        wanted = min(wanted, plan.total - plan.between)  # ``AllowedMethods`` refuses more
    return max(plan.kept, wanted)
