"""When an answer is asked for again with more visual tokens, parsed from what the client sent.

A model tells how sure it is: the confidence of an answer is the lowest probability of the likeliest token among
its first tokens, before temperature and penalties. Below a threshold, the answer is dropped before any of it has
left, and the prompt is answered again with more tokens. docs/server.md has what that costs and gains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from promprune_vllm.core.budget import FULL, Budget, json_type, number_of, shown
from promprune_vllm.errors import BudgetError

ESCALATE_FIELD = "visual_token_escalate"
BELOW = 0.9
"""Threshold of a request that asks for a second try without one, on a server without one."""
WINDOW = 16
"""How many tokens of an answer decide by default."""
_KEYS = ("below", "to")
_NEXT_STEP = (
    "Send the probability below which the answer is asked for again (such as 0.9), "
    '{"below": 0.9, "to": "full"} with the budget of the second try, true for the server\'s threshold, false for '
    "no second try, or omit the field."
)


@dataclass(frozen=True, slots=True)
class Escalation:
    """When and how to ask again.

    Args:
        below: Answers with a lower confidence are asked for again; above 0 and at most 1.
        to: Budget of each image and video in the second try, tokens or a share. None keeps fewer tokens than in
            the first.
        window: How many tokens of the first answer decide; an answer that ends earlier is decided at its end.
    """

    below: float = BELOW
    to: Budget = field(default_factory=lambda: Budget(share=Fraction(1)))
    window: int = WINDOW

    def printed(self) -> dict[str, object]:
        """Return the JSON object that ``EscalationRequest.parse`` reads, and the window."""
        return {"below": self.below, "to": self.to.printed(), "window": self.window}


@dataclass(frozen=True, slots=True)
class EscalationRequest:
    """What one request says about asking again.

    Args:
        wanted: Whether an answer may be asked for again.
        below: See ``Escalation``; ``None`` for the server's.
        to: See ``Escalation``; ``None`` for the server's.
    """

    wanted: bool = True
    below: float | None = None
    to: Budget | None = None

    @classmethod
    def parse(cls, value: object) -> EscalationRequest:
        """Parse the value a client sent as ``visual_token_escalate``.

        Raises:
            BudgetError: The value is none of the forms. The message gives the value, the limits and the next step.
        """
        if isinstance(value, bool):
            return cls(wanted=value)
        if isinstance(value, Mapping):
            if not value or set(value) - set(_KEYS):
                raise _error(value, "an object with 'below', 'to' or both")
            below = None if value.get("below") is None else _threshold(value["below"], f"{ESCALATE_FIELD}.below")
            return cls(below=below, to=None if value.get("to") is None else _budget(value["to"]))
        return cls(below=_threshold(value, ESCALATE_FIELD))

    def over(self, default: Escalation) -> Escalation | None:
        """Return the escalation in force, ``None`` for no second try; what was not sent is the server's."""
        if not self.wanted:
            return None
        below = default.below if self.below is None else self.below
        return Escalation(below, self.to or default.to, default.window)


def _threshold(value: object, name: str) -> float:
    number = number_of(value)
    if number is None or not 0 < number <= 1:
        raise _error(value, "a probability above 0 and at most 1", name)
    return float(number)


def _budget(value: object) -> Budget:
    name = f"{ESCALATE_FIELD}.to"
    try:
        budget = Budget.parse(value, name)
    except BudgetError as error:
        raise BudgetError(str(error), param=ESCALATE_FIELD) from error
    if budget is None or budget.per_frame is not None:  # it is one budget for images and videos
        raise _error(value, f'tokens, a share or "{FULL}"', name)
    return budget


def _error(value: object, requirement: str, name: str = ESCALATE_FIELD) -> BudgetError:
    message = f"{name} must be {requirement}, got {shown(value)} ({json_type(value)}). {_NEXT_STEP}"
    return BudgetError(message, param=ESCALATE_FIELD)
