"""What one request asks for, validated once and carried to the processor as an object."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from promprune_vllm.core.budget import Budget, BudgetRequest
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.engine.api_server.request_fields import PruningFields
from promprune_vllm.engine.keys import REQUEST

logger = logging.getLogger("vllm.promprune")


@dataclass(frozen=True, slots=True)
class PruningRequest:
    """A request's validated budget, with what else matters for its images.

    Args:
        budget: For all of its images.
        sent: Whether the client sent a budget, or a method, which implies ``"auto"``.
        method: Name of the method, checked by the processor, which knows the allowed ones; ``None`` for the
            server's default.
        text: The user's last message, for methods that use it.
        details: OpenAI's ``detail`` of each image, where the operator honors it.
    """

    budget: BudgetRequest = field(default_factory=BudgetRequest)
    sent: bool = False
    method: object = None
    text: str | None = None
    details: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, fields: PruningFields) -> PruningRequest:
        """Validate a request's fields, unless the budget was parsed already.

        Raises:
            BudgetError: The budget is not one.
        """
        budget = fields.budget
        if not isinstance(budget, BudgetRequest):
            budget = BudgetRequest() if budget is None else BudgetRequest.parse(budget)
        return cls(budget, fields.explicit, fields.method, fields.text, fields.details)

    @classmethod
    def taken_from(cls, kwargs: Mapping[str, object]) -> tuple[PruningRequest, dict[str, object]]:
        """Split processor options into what they ask for and the rest, which alone Hugging Face's processor sees.

        Raises:
            BudgetError: One of our fields, as an offline program may send them, has a wrong type or value.
        """
        fields, rest = PruningFields.taken_from(kwargs)
        carried = rest.pop(REQUEST, None)
        return carried if isinstance(carried, PruningRequest) else cls.parse(fields), rest

    def with_details(self, images: int, policy: BudgetPolicy) -> BudgetRequest:
        """Return the budget; where none was sent, the one that OpenAI's ``detail`` stands for."""
        if self.sent or self.details is None:
            return self.budget
        if len(self.details) != images:
            logger.warning(
                "Ignored all %d image details of a request: it has %d images.", len(self.details), images
            )
            return self.budget
        budgets = {"low": Budget(tokens=policy.low), "high": Budget.parse("full")}
        return BudgetRequest(each=tuple(budgets.get(detail) for detail in self.details))
