"""What programs that ask a server of ours share: its address, its API key, what its replies tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promprune_vllm.server.reply_headers import KEPT_HEADER, SEEN_HEADER
from promprune_vllm.server.usage import USAGE_FIELD


def base_url(url: str) -> str:
    """Return a server's address without the ``/v1`` of OpenAI's clients and without a slash at its end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def authorization(api_key: str | None) -> dict[str, str]:
    """Return the headers that carry an API key, if there is one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def counted_tokens(headers: Mapping[str, str]) -> tuple[int, int]:
    """Return the visual tokens of a reply's images and videos, before pruning and kept; zeros if it had none."""
    return int(headers.get(SEEN_HEADER, 0)), int(headers.get(KEPT_HEADER, 0))


def was_asked_again(usage: Mapping[str, Any]) -> bool:
    """Return whether an answer was thrown away for one with more visual tokens.

    Args:
        usage: ``usage`` of the reply.
    """
    return any(first["asked_again"] for first in usage.get(USAGE_FIELD, {}).get("first_tries", ()))
