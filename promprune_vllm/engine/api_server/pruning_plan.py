"""The plan of a prompt's images and videos, which travels through vLLM's multimodal processing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from promprune_vllm.core.budget import IMAGE, VIDEO, BudgetRequest
from promprune_vllm.engine.keys import PLAN, RECORDED, SUMMARY
from promprune_vllm.server.usage import record_images

if TYPE_CHECKING:
    from promprune_vllm.core.escalation import Escalation
    from promprune_vllm.engine.api_server.pruning_request import PruningRequest

MAX_TEXT_TOKENS = 256
"""Only the last 256 tokens of the user's text are used: enough for a question."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How one image or video is pruned.

    Args:
        total: Tokens before pruning.
        kept: Tokens after pruning.
        method: Index among the allowed methods.
        text: Tokens of the user's text, if the method uses it.
        size: Width and height in pixels; ``None`` for videos, ``image_embeds`` and unknown named images.
        kind: ``IMAGE`` or ``VIDEO``.
        between: Tokens of text that enter among the kept ones as embeddings; see ``keys.LAYOUT``.
    """

    total: int
    kept: int
    method: int = 0
    text: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    kind: str = IMAGE
    between: int = 0

    @property
    def rows(self) -> int:
        """Embeddings that enter the language model."""
        return self.kept + self.between


@dataclass(frozen=True, slots=True)
class ProcessedVideos:
    """What the Hugging Face processor has made of some of a prompt's videos.

    Args:
        indices: Which videos.
        output: Its output for them, in this order.
    """

    indices: tuple[int, ...]
    output: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Targeted:
    """That a prompt's images keep what the server's target says.

    Args:
        size: Class of the largest image, by its tokens before pruning; see ``core.target.size_class``.
        share: Share of their tokens that all images keep.
    """

    size: int
    share: Fraction

    def decides(self, request: PruningRequest, budget: BudgetRequest, levels: Sequence[Fraction]) -> bool:
        """Whether nothing else has a say: not the client, and neither load nor content.

        Args:
            request: What the client sent.
            budget: Its budget, also by OpenAI's ``detail``.
            levels: Share of the default that each image keeps.
        """
        return request.method is None and budget == BudgetRequest() and {*levels} == {self.share}


@dataclass(slots=True)
class Plan:
    """The plans of the images and videos in one processor call, each by kind: ``IMAGE`` or ``VIDEO``.

    Args:
        media: One plan per image or video, in order of appearance among those of its kind.
        cached: Which ones vLLM's processor cache already had; filled in during the call.
        named_uuids: Index -> uuid of each that is named and remembered, see ``named_images``.
        hashes: vLLM's own cache keys, before ours; empty unless something needs them before vLLM does.
        identities: ``IDENTITY`` of each; none unless the feature cache is on.
        processed: What the Hugging Face processor has already made of the videos; see ``prompt_videos``.
        targeted: See ``Summary``.
    """

    media: Mapping[str, tuple[ImagePlan, ...]] = field(default_factory=dict)
    cached: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    named_uuids: Mapping[str, Mapping[int, object]] = field(default_factory=dict)
    hashes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    identities: Mapping[str, Sequence[bytes]] = field(default_factory=dict)
    processed: ProcessedVideos | None = None
    targeted: Targeted | None = None

    def take(self, indices: Mapping[str, Sequence[int]]) -> Plan:
        """Return the plan of some of the images and videos, given their indices by kind."""
        processed = self.processed
        if processed is not None and processed.indices != tuple(indices.get(VIDEO, ())):
            processed = None  # not the same videos: they are processed again
        return Plan(
            {kind: tuple(self.media[kind][i] for i in each) for kind, each in indices.items()},
            identities={kind: [keys[i] for i in indices[kind]] for kind, keys in self.identities.items()},
            processed=processed,
        )


@dataclass(frozen=True, slots=True)
class Retry:
    """The second try of a pruned prompt.

    Args:
        escalation: When to ask again.
        request: What to ask then: a budget for each image and video, and everything else as in the first try.
        more_tokens: How much longer the prompt is then.
        sent: Whether the client asked for a second try, and not only the server's operator.
    """

    escalation: Escalation
    request: PruningRequest
    more_tokens: int
    sent: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """How the images and videos of one prompt were pruned.

    Args:
        images: One plan per image or video, in order of appearance.
        cached: Which ones vLLM's processor cache already had. Ignored by ``==``.
        method: Name of the request's method.
        form: How the request wrote its budget (see ``BudgetRequest.form``), ``None`` if it did not send one.
        retry: The second try that this prompt may have. Ignored by ``==``.
        targeted: What a target says its images keep, if nothing else decides what it keeps. Ignored by ``==``.
    """

    images: tuple[ImagePlan, ...]
    cached: tuple[bool, ...] = field(compare=False)
    method: str
    form: str | None
    retry: Retry | None = field(default=None, compare=False)
    targeted: Targeted | None = field(default=None, compare=False)

    @property
    def is_audited(self) -> bool:
        """Whether there is anything to learn from an audit of its answer."""
        return self.kept < self.total or self.targeted is not None

    @property
    def total(self) -> int:
        """Visual tokens before pruning."""
        return sum(image.total for image in self.images)

    @property
    def kept(self) -> int:
        """Visual tokens after pruning."""
        return sum(image.kept for image in self.images)


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
        prompt[RECORDED] = record_images(**_counted(prompt, summary))


def replace_prompt_images(prompt: Any, second: Any) -> None:
    """Record the images of a prompt's second try in place of its own."""
    record_images(**_counted(second, second[SUMMARY]), at=prompt[RECORDED])


def _counted(prompt: Any, summary: Summary) -> dict[str, Any]:
    keys = {kind: iter(hashes) for kind, hashes in prompt["mm_hashes"].items()}
    return {
        "images": [(image.total, image.kept) for image in summary.images],
        "identifiers": [next(keys[image.kind]) for image in summary.images],
        "sizes": [image.size for image in summary.images],
        "kinds": [image.kind for image in summary.images],
    }
