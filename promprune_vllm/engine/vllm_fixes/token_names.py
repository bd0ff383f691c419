"""Workaround for logprobs of token ids that the tokenizer has no name for.

A model's last layer often has more rows than its tokenizer has tokens. vLLM (0.29 to 0.33) looks up the name of
every id in a request's logprobs. With a Llama tokenizer, which marks spaces with a special character, an id
without a name raises ``TypeError`` in the task that handles the outputs of all requests, which ends the server.
Top logprobs, prompt logprobs, scored labels and beam search all use the function that is wrapped here.
"""

from __future__ import annotations

from typing import Any


def allow_unnamed_tokens(original: Any) -> Any:
    """Wrap the formatting of a token's name: a token without one gets the empty text, as elsewhere in vLLM."""

    def restore_leading_spaces(raw_token: str | None, token_str: str, marker: str) -> str:
        return token_str if raw_token is None else original(raw_token, token_str, marker)

    return restore_leading_spaces
