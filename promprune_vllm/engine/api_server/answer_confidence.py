"""How sure a model is of an answer, read from the first tokens of vLLM's outputs while these are held back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import RequestOutputKind

from promprune_vllm.core.escalation import Escalation


class Watch:
    """Watches the first try of one request.

    Args:
        escalation: When to ask again.
        params: The client's sampling parameters, with n = 1.

    Attributes:
        params: The sampling parameters of the first try, with the likeliest token's probability.
        confidence: Lowest probability of a likeliest token so far.
        tokens: Tokens of the answer so far.
        decided: Whether it is known if the answer is sure.
        unsure: Whether the confidence is below the threshold; then no output has left.
        failed: Whether the engine failed or aborted the request.
    """

    def __init__(self, escalation: Escalation, params: Any) -> None:
        self._escalation = escalation
        self._asked = params.logprobs
        self._final_only = params.output_kind == RequestOutputKind.FINAL_ONLY
        self._cumulative = params.output_kind != RequestOutputKind.DELTA
        self.params = params.clone()
        if self._asked in (None, 0):
            self.params.logprobs = 1
        if self._final_only:  # else it would be known only at the end
            self.params.output_kind = RequestOutputKind.CUMULATIVE
        self.confidence = 1.0
        self.tokens = 0
        self.decided = self.unsure = self.failed = False
        self._held: list[Any] = []

    def take(self, output: Any) -> list[Any]:
        """Take one output, and return those that leave now, as the client's parameters have them."""
        if not self.decided:
            self.decided = self._decides(output)
        if self.unsure:
            return []
        if not self._final_only or output.finished:
            self._held.append(self._as_asked(output))
        if not self.decided:
            return []
        leaving, self._held = self._held, []
        return leaving

    def _decides(self, output: Any) -> bool:
        """Take an output's tokens into account, and return whether the answer is decided with it."""
        (answer,) = output.outputs
        self.failed = has_failed(output)
        start = self.tokens if self._cumulative else 0
        window = self._escalation.window - self.tokens
        for likeliest in map(_likeliest, (answer.logprobs or ())[start : start + window]):
            self.confidence = min(self.confidence, likeliest)
        self.tokens = len(answer.token_ids) if self._cumulative else self.tokens + len(answer.token_ids)
        self.unsure = self.confidence < self._escalation.below and not self.failed
        return self.unsure or output.finished or self.tokens >= self._escalation.window

    def _as_asked(self, output: Any) -> Any:
        """Return an output without the logprobs that the client did not ask for."""
        for answer in output.outputs if self._asked in (None, 0) else ():
            if self._asked is None:
                answer.logprobs = answer.cumulative_logprob = None
            elif answer.logprobs is not None:
                answer.logprobs = _of_chosen(answer.logprobs, answer.token_ids)
        return output


def has_failed(output: Any) -> bool:
    """Return whether an output says that the engine failed or aborted the request."""
    return any(answer.finish_reason in ("error", "abort") for answer in output.outputs)


def _likeliest(logprobs: Any) -> float:
    """Return the probability of the likeliest token at one place: token id -> vLLM's ``Logprob``."""
    return math.exp(max(each.logprob for each in logprobs.values()))


def _of_chosen(logprobs: Any, tokens: Sequence[int]) -> Any:
    """Return logprobs, in vLLM's type, of the chosen tokens alone."""
    chosen = type(logprobs)()
    # Older minors give an aborted output without tokens the logprobs of all before.
    for place, token in zip(logprobs[len(logprobs) - len(tokens) :], tokens, strict=True):
        chosen.append({token: place[token]})
    return chosen
