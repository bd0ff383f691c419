"""A request's budget, validated once and carried to the processor as an object."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from fractions import Fraction

from promprune_vllm.core.budget import IMAGE, Budget, BudgetRequest
from promprune_vllm.core.escalation import EscalationRequest
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.engine.api_server.request_fields import PruningFields
from promprune_vllm.engine.keys import REQUEST

logger = logging.getLogger("vllm.promprune")


@dataclass(frozen=True, slots=True)
class PruningRequest:
    """A request's validated budget, and the other fields that affect its images.

    Args:
        budget: The budget of all its images.
        sent: Whether the client sent a budget, or a method, which implies ``"auto"``.
        method: Name of the method, ``None`` for the server's default. The processor checks it, since it knows the
            allowed methods.
        text: The user's last message, for methods that use it.
        details: OpenAI's ``detail`` of each image, if the server honors it.
        escalate: Whether and when the answer is asked for again; ``None`` if the client does not say.
        order: ``IMAGE`` or ``VIDEO`` and index among its kind of each, in order of appearance, where the prompt
            was processed before; ``None`` if it is yet to be found.
        unpruned: Whether all tokens are kept, whatever the server's limits: for audits.
        share: Share that images keep in place of the server's target's: for audits.
    """

    budget: BudgetRequest = field(default_factory=BudgetRequest)
    sent: bool = False
    method: object = None
    text: str | None = None
    details: tuple[str, ...] | None = None
    escalate: EscalationRequest | None = None
    order: tuple[tuple[str, int], ...] | None = None
    unpruned: bool = False
    share: Fraction | None = None

    @property
    def asks_again(self) -> bool:
        """Whether the client asks for a second try."""
        return self.escalate is not None and self.escalate.wanted

    @classmethod
    def parse(cls, fields: PruningFields) -> PruningRequest:
        """Validate a request's fields.

        Raises:
            BudgetError: The budget or the escalation is invalid.
        """
        budget = BudgetRequest() if fields.budget is None else BudgetRequest.parse(fields.budget)
        escalate = None if fields.escalate is None else EscalationRequest.parse(fields.escalate)
        return cls(budget, fields.explicit, fields.method, fields.text, fields.details, escalate)

    @classmethod
    def split_options(cls, kwargs: Mapping[str, object]) -> tuple[PruningRequest, dict[str, object]]:
        """Split processor options into our request and the rest. The Hugging Face processor sees only the rest.

        Raises:
            BudgetError: One of our options, which offline programs may set, has a wrong type or value.
        """
        fields, rest = PruningFields.split_options(kwargs)
        carried = rest.pop(REQUEST, None)
        return carried if isinstance(carried, PruningRequest) else cls.parse(fields), rest

    def with_details(self, kinds: Sequence[str], policy: BudgetPolicy) -> BudgetRequest:
        """Return the budget; if none was sent, the one that OpenAI's ``detail`` of images implies.

        Args:
            kinds: ``IMAGE`` or ``VIDEO`` for each image and video, in order of appearance.
            policy: For images.
        """
        if self.sent or self.details is None:
            return self.budget
        images = kinds.count(IMAGE)
        if len(self.details) != images:
            logger.warning(
                "Ignored the %d image details of a request, because it has %d images.", len(self.details), images
            )
            return self.budget
        budgets = {"low": Budget(tokens=policy.low), "high": Budget.parse("full")}
        details = iter(self.details)
        return BudgetRequest(each=tuple(budgets.get(next(details)) if kind == IMAGE else None for kind in kinds))


_admitted: ContextVar[PruningRequest | None] = ContextVar("visual_token_request", default=None)


def remember_admitted(request: PruningRequest) -> None:
    """Remember what the current HTTP request asks for, which was parsed and admitted when its body was read."""
    _admitted.set(request)


def admitted_request() -> PruningRequest | None:
    """Return it, or ``None`` if the client sent no fields or there is no HTTP request."""
    request = _admitted.get()
    return request if request is not None and (request.sent or request.escalate is not None) else None
