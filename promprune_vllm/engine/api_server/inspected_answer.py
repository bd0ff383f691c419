"""The answer to an inspected image's question: how sure the model is of it, and what a second try answers.

The answer with the kept tokens is a request that is never asked again. If an escalation is in force and its
confidence is too low, the same question is sent as a client would send it, and what leaves is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from promprune_vllm.core.escalation import ESCALATE_FIELD, Escalation
from promprune_vllm.server.inspect_schemas import Answer, Try
from promprune_vllm.server.usage import ImageUsage

ANSWER_TOKENS = 32
_GREEDY = {"temperature": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
"""With these, the likeliest token is chosen, so the probabilities of the chosen ones tell the confidence."""


@dataclass(frozen=True, slots=True)
class Question:
    """How an inspected image's question is answered.

    Args:
        window: How many tokens of an answer decide.
        has_confidence: Whether the server returns the log-probabilities that confidence is read from.
        escalation: When the answer is asked for again; ``None`` for never.
        sent: ``visual_token_escalate`` as the client sent it, ``None`` if it did not.
    """

    window: int
    has_confidence: bool
    escalation: Escalation | None
    sent: object

    def first_fields(self) -> dict[str, Any]:
        """Return the fields of the chat request for the answer with the kept tokens."""
        return {**self._fields(), ESCALATE_FIELD: False}

    def second_fields(self) -> dict[str, Any]:
        """Return the fields of the chat request that may be asked again, as a client would send it."""
        return self._fields() | ({} if self.sent is None else {ESCALATE_FIELD: self.sent})

    def _fields(self) -> dict[str, Any]:
        return {**_GREEDY, "max_tokens": ANSWER_TOKENS, "logprobs": self.has_confidence}

    def tried(self, reply: Any, usage: ImageUsage) -> Try:
        """Return what one try answered.

        Args:
            reply: vLLM's reply.
            usage: Visual tokens of its request.
        """
        (choice,) = reply.choices
        return Try(
            text=choice.message.content or "",
            confidence=self._confidence(choice),
            kept=usage.kept,
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens,
        )

    def _confidence(self, choice: Any) -> float | None:
        tokens = (choice.logprobs.content or ()) if choice.logprobs else ()
        logprobs = [token.logprob for token in tokens[: self.window]]
        return math.exp(min(logprobs)) if logprobs else None

    def is_unsure(self, first: Try) -> bool:
        """Whether a client's request would be asked again after this first try."""
        return (
            self.escalation is not None
            and first.confidence is not None
            and first.confidence < self.escalation.below
        )

    def answer(self, first: Try, second: tuple[Try, ImageUsage] | None = None) -> Answer:
        """Return the answer that leaves.

        Args:
            first: The try with the kept tokens.
            second: What a client's request answered, and its visual tokens, if there was one.
        """
        below = None if self.escalation is None else self.escalation.below
        if second is not None:
            last, usage = second
            if any(each.asked_again for each in usage.first_tries):
                return Answer(**_rounded(last), below=below, first=Try(**_rounded(first)))
        return Answer(**_rounded(first), below=below, first=None)


def _rounded(tried: Try) -> Mapping[str, Any]:
    confidence = None if tried.confidence is None else round(tried.confidence, 6)
    return {**tried.model_dump(), "confidence": confidence}
