"""What is to happen to the images of one prompt, as it travels through vLLM's processing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from promprune_vllm.engine.keys import PLAN, RECORDED, SUMMARY
from promprune_vllm.server.usage import record_images

MAX_TEXT_TOKENS = 256
"""The last so many of the user's text: a question, not a document."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What happens to one image: visual tokens before and after pruning, and what selects them.

    Args:
        total: Tokens before pruning.
        kept: Tokens after.
        method: Index among the allowed methods.
        text: Tokens of the user's text, where the method looks at it.
        size: Width and height in pixels; ``None`` of an image that came encoded, or that is named and not known.
    """

    total: int
    kept: int
    method: int = 0
    text: tuple[int, ...] = ()
    size: tuple[int, int] | None = None


@dataclass(slots=True)
class Plan:
    """What happens to the images of one call of the processor, in order of appearance.

    Args:
        images: One plan each.
        cached: Filled in on the way: which of them vLLM's processor cache already had.
        named: The uuid of each that was not sent, by its place; without those that nothing is known of.
    """

    images: tuple[ImagePlan, ...] = ()
    cached: tuple[bool, ...] = ()
    named: Mapping[int, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """What happened to the images of one prompt.

    Args:
        images: One plan each, in order of appearance.
        cached: Which of them vLLM's processor cache already had. A prompt equals itself whether they were or not.
        method: What selects the tokens of images that lose any.
        form: How the request wrote its budget (see ``BudgetRequest.form``), ``None`` if it did not send one.
    """

    images: tuple[ImagePlan, ...]
    cached: tuple[bool, ...] = field(compare=False)
    method: str
    form: str | None


def split(kwargs: Mapping[str, object]) -> tuple[Plan, dict[str, object]]:
    """Take our plan out of processor options."""
    rest = dict(kwargs)
    plan: Any = rest.pop(PLAN, None)
    return plan or Plan(), rest


def record_prompt_images(prompt: Any) -> None:
    """Add a processed prompt's images to the usage of the request being handled; each prompt counts once."""
    summary: Summary | None = prompt.get(SUMMARY)
    if summary is None or prompt.get(RECORDED):
        return
    prompt[RECORDED] = True
    images = summary.images
    counts = [(image.total, image.kept) for image in images]
    record_images(counts, prompt["mm_hashes"]["image"], [image.size for image in images])


def shortened(update: Any, plan: tuple[ImagePlan, ...]) -> Any:
    """Make an image's placeholder as long as what it keeps."""
    original = update.replacement

    def replacement(index: int) -> list[int]:
        placeholder: list[int] = original(index)
        image = plan[index]
        if len(placeholder) != image.total:
            raise RuntimeError(
                f"vLLM makes a placeholder of {len(placeholder)} tokens where {image.total} were counted"
            )
        return placeholder[: image.kept]

    return replace(update, replacement=replacement)
