"""Token ids that the tokenizer has no name for, in logprobs.

A model's last layer often has more rows than its tokenizer has tokens. vLLM (0.29 to 0.32) looks up the name of
every id in a request's logprobs. With a tokenizer of Llama's kind, which marks spaces with a character of its own,
an id without a name raises ``TypeError`` in the task that handles the outputs of all requests, and that ends the
server. Top logprobs, prompt logprobs, scored labels and beam search all get their names by the function that is
wrapped here.
"""

from __future__ import annotations

from typing import Any


def allow_nameless(original: Any) -> Any:
    """Wrap the look at a token's name: without one, it gets the empty text that vLLM gives it everywhere else."""

    def restore_leading_spaces(raw_token: str | None, token_str: str, marker: str) -> str:
        return token_str if raw_token is None else original(raw_token, token_str, marker)

    return restore_leading_spaces
