"""The tokens of an answer and how likely each was, collected from vLLM's outputs while they leave."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import RequestOutputKind

from promprune_vllm.core.audit import Scored
from promprune_vllm.engine.api_server.answer_confidence import has_failed

_GREEDY_BELOW = 1e-5
"""vLLM takes the likeliest token below this temperature."""


class ServedAnswer:
    """Collects the tokens of one answer and their scores while the outputs leave.

    Args:
        params: The client's sampling parameters, with n = 1.
        lora: LoRA adapter of the request, if it has one.

    Attributes:
        params: The sampling parameters to generate it with: with the log-probability of each token.
        lora: As above.
        greedy: Whether the likeliest token is chosen at each place.
        tokens: Token ids so far.
        scores: Of each token.
        is_whole: Whether the answer has ended, was not cut off by an error, and has a token.
    """

    def __init__(self, params: Any, lora: Any = None) -> None:
        self._takes_off = params.logprobs is None
        self._cumulative = params.output_kind != RequestOutputKind.DELTA
        self.params, self.lora = params, lora
        if self._takes_off:
            self.params = params.clone()
            self.params.logprobs = 0
        self.greedy: bool = params.temperature < _GREEDY_BELOW
        self.tokens: list[int] = []
        self.scores: list[Scored] = []
        self.is_whole = False

    def take(self, output: Any) -> Any:
        """Take one output, and return it as the client's parameters have it."""
        (answer,) = output.outputs
        tokens, logprobs = list(answer.token_ids), answer.logprobs or ()
        start = len(self.tokens) if self._cumulative else 0
        # Older minors give an aborted output without tokens the logprobs of all before.
        places = logprobs[len(logprobs) - len(tokens) + start :]
        self.tokens += tokens[start:]
        # Not strict: whatever vLLM leaves out, the answer leaves; it is only not audited then.
        pairs = zip(places, tokens[start:], strict=False)
        self.scores += [scored(place[token]) for place, token in pairs if token in place]
        ended = output.finished and not has_failed(output)
        self.is_whole = ended and 0 < len(self.tokens) == len(self.scores)
        if self._takes_off:
            answer.logprobs = answer.cumulative_logprob = None
        return output


def scored(logprob: Any) -> Scored:
    """Return the score in vLLM's ``Logprob``."""
    return Scored(logprob.logprob, logprob.rank == 1)
