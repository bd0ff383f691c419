"""What programs that ask a server of ours share: its address, its API key, the headers of its replies."""

from __future__ import annotations

from collections.abc import Mapping

from promprune_vllm.server.reply_headers import KEPT_HEADER, SEEN_HEADER


def base_url(url: str) -> str:
    """Return a server's address without the ``/v1`` of OpenAI's clients and without a slash at its end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def authorization(api_key: str | None) -> dict[str, str]:
    """Return the headers that carry an API key, if there is one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def counted_tokens(headers: Mapping[str, str]) -> tuple[int, int]:
    """Return the visual tokens of a reply's images, before pruning and kept; zeros where it had none."""
    return int(headers.get(SEEN_HEADER, 0)), int(headers.get(KEPT_HEADER, 0))
