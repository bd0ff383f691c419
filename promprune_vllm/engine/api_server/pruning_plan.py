"""The plan of a prompt's images, which travels through vLLM's multimodal processing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from promprune_vllm.engine.keys import PLAN, RECORDED, SUMMARY
from promprune_vllm.server.usage import record_images

if TYPE_CHECKING:
    from promprune_vllm.core.escalation import Escalation
    from promprune_vllm.engine.api_server.pruning_request import PruningRequest

MAX_TEXT_TOKENS = 256
"""Only the last 256 tokens of the user's text are used: enough for a question."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How one image is pruned.

    Args:
        total: Tokens before pruning.
        kept: Tokens after pruning.
        method: Index among the allowed methods.
        text: Tokens of the user's text, if the method uses it.
        size: Width and height in pixels; ``None`` for ``image_embeds`` and for unknown named images.
    """

    total: int
    kept: int
    method: int = 0
    text: tuple[int, ...] = ()
    size: tuple[int, int] | None = None


@dataclass(slots=True)
class Plan:
    """The plans of the images in one processor call.

    Args:
        images: One plan per image, in order of appearance.
        cached: Which images vLLM's processor cache already had; filled in during the call.
        named_uuids: Index -> uuid of each named image that is remembered, see ``named_images``.
        hashes: vLLM's own cache keys by modality, before ours; empty unless the feature cache is on.
        identities: ``IDENTITY`` of each image; none unless the feature cache is on.
    """

    images: tuple[ImagePlan, ...] = ()
    cached: tuple[bool, ...] = ()
    named_uuids: Mapping[int, object] = field(default_factory=dict)
    hashes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    identities: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Retry:
    """The second try of a pruned prompt.

    Args:
        escalation: When to ask again.
        request: What to ask then: a budget for each image, and everything else as in the first try.
        more_tokens: How much longer the prompt is then.
        sent: Whether the client asked for a second try, and not only the server's operator.
    """

    escalation: Escalation
    request: PruningRequest
    more_tokens: int
    sent: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """How the images of one prompt were pruned.

    Args:
        images: One plan per image, in order of appearance.
        cached: Which images vLLM's processor cache already had. Ignored by ``==``.
        method: Name of the request's method.
        form: How the request wrote its budget (see ``BudgetRequest.form``), ``None`` if it did not send one.
        modality: vLLM's name of what the images are, see ``ProcessorFamily``.
        retry: The second try that this prompt may have. Ignored by ``==``.
    """

    images: tuple[ImagePlan, ...]
    cached: tuple[bool, ...] = field(compare=False)
    method: str
    form: str | None
    modality: str
    retry: Retry | None = field(default=None, compare=False)


def split_plan(kwargs: Mapping[str, object]) -> tuple[Plan, dict[str, object]]:
    """Split processor options into our plan and the rest."""
    rest = dict(kwargs)
    plan: Any = rest.pop(PLAN, None)
    return plan or Plan(), rest


def identity(key: str) -> bytes:
    """Return an image's ``IDENTITY``, from vLLM's own cache key of the unpruned image."""
    # A client's uuid may contain characters that UTF-8 cannot encode.
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()


def record_prompt_images(prompt: Any) -> None:
    """Add a processed prompt's images to the usage of the current request; each prompt counts once."""
    summary: Summary | None = prompt.get(SUMMARY)
    if summary is not None and RECORDED not in prompt:
        prompt[RECORDED] = record_images(*_counted(prompt, summary))


def replace_prompt_images(prompt: Any, second: Any) -> None:
    """Record the images of a prompt's second try in place of its own."""
    record_images(*_counted(second, second[SUMMARY]), at=prompt[RECORDED])


def _counted(prompt: Any, summary: Summary) -> tuple[list[tuple[int, int]], list[str], list[Any]]:
    counts = [(image.total, image.kept) for image in summary.images]
    return counts, prompt["mm_hashes"][summary.modality], [image.size for image in summary.images]
