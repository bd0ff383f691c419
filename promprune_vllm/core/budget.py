"""The budget of a request: how many visual tokens its images and videos keep, parsed from what the client sent.

Nothing here depends on pixels or features, so the placeholder in the prompt, the scheduler, the KV blocks
and the encoder's output always agree on the count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import Any

from promprune_vllm.errors import BudgetError

FIELD = "visual_token_budget"
METHOD_FIELD = "visual_token_method"
MAX_BUDGET_TOKENS = 1_000_000
"""Largest token count a request may send; far above any image, far below any overflow."""
MAX_IMAGES = 1024
"""Longest list of budgets a request may send."""

KINDS = IMAGE, VIDEO = "image", "video"
"""vLLM's names of what has visual tokens."""
AUTO = "auto"
FULL = "full"
_PERCENT = re.compile(r"(\d{1,3})(\.\d{1,9})?%", re.ASCII)
_NUMBER = re.compile(r"(0|[1-9]\d{0,6})(\.\d{1,9})?", re.ASCII)
_TOKENS = f"an integer from 1 to {MAX_BUDGET_TOKENS} if it is a number of tokens"
_NEXT_STEP = (
    f'Send tokens per image or video (1 to {MAX_BUDGET_TOKENS}), a share of them (0.25 or "25%"), "full", "auto", '
    '{"per_frame": tokens} for videos, a list of these with one entry per image or video, {"total": tokens} for '
    "all of them together, or omit the field."
)


@dataclass(frozen=True, slots=True)
class Budget:
    """The budget of one image or video: a number of tokens, a share of its tokens, or tokens per frame.

    Wherever a budget may be ``None``, that means ``"auto"``: the server's policy decides.

    Args:
        tokens: Visual tokens to keep, 1 to ``MAX_BUDGET_TOKENS``.
        share: Share of its tokens to keep, above 0 and at most 1; 1 is ``"full"``.
        per_frame: Visual tokens to keep of each frame of a video, on average, 1 to ``MAX_BUDGET_TOKENS``.

    Raises:
        BudgetError: Not exactly one of the three is given, or it is outside its limits.
    """

    tokens: int | None = None
    share: Fraction | None = None
    per_frame: int | None = None

    def __post_init__(self) -> None:
        if [self.tokens, self.share, self.per_frame].count(None) != 2:
            raise BudgetError(
                "A budget is a number of tokens, a share of them, or a number per frame: give exactly one."
            )
        for tokens in (self.tokens, self.per_frame):
            if tokens is not None and not 1 <= tokens <= MAX_BUDGET_TOKENS:
                raise _error(tokens, _TOKENS)
        if self.share is not None and not 0 < self.share <= 1:
            raise _error(self.printed(), "above 0 and at most 100% if it is a share")

    @classmethod
    def parse(cls, value: object, name: str = FIELD) -> Budget | None:
        """Parse what a client sent for one image or video.

        Args:
            value: The decoded JSON value: tokens as an integer, a share as a number between 0 and 1, a percentage
                such as ``"25%"``, ``"full"``, ``"auto"``, or for videos ``{"per_frame": tokens}``. ``64.0`` and
                ``"64"`` mean 64, and ``"0.25"`` means 0.25: protobuf gateways send every number as a double, and
                forms send text. ``true``, ``1.5`` and ``" 64"`` are refused.
            name: Name of the field in error messages.

        Returns:
            The budget; ``None`` for ``"auto"``.

        Raises:
            BudgetError: The value is not a budget. The message gives the value, the limits and the next step.
        """
        number = number_of(value)
        if isinstance(number, int):
            if not 1 <= number <= MAX_BUDGET_TOKENS:
                raise _error(value, _TOKENS, name)  # shows the value as it was sent
            return cls(tokens=number)
        if number is not None and 0 < number < 1:
            return cls(share=number)
        if isinstance(value, str):
            if value == AUTO:
                return None
            if value == FULL:
                return cls(share=Fraction(1))
            if _PERCENT.fullmatch(value) and 0 < (percent := Fraction(value[:-1])) <= 100:
                return cls(share=percent / 100)
        if isinstance(value, dict):
            return cls(per_frame=_tokens_of(value, "per_frame", name))
        raise _error(value, 'tokens, a share, "full", "auto" or {"per_frame": tokens}', name)

    def printed(self) -> int | float | str | dict[str, int]:
        """Return the JSON value that ``parse`` turns into this budget."""
        if self.tokens is not None:
            return self.tokens
        if self.per_frame is not None:
            return {"per_frame": self.per_frame}
        assert self.share is not None
        return FULL if self.share == 1 else float(self.share)

    def of(self, total: int, frames: int = 1) -> int:
        """Return the number of tokens to keep of an image or video; may exceed ``total``.

        Args:
            total: Its tokens before pruning.
            frames: Frames of a video, which share the tokens equally.
        """
        if self.tokens is not None:
            return self.tokens
        if self.per_frame is not None:
            return self.per_frame * frames
        assert self.share is not None
        return -(-self.share.numerator * total // self.share.denominator)  # exact ceiling


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """The budget of a request, for all of its images and videos.

    Args:
        each: One budget that applies to every image and video, or a tuple with one for each in order of
            appearance. One budget per frame applies to every video; images have ``"auto"`` then.
        total: Tokens for all images and videos together, instead of ``each``.
    """

    each: Budget | tuple[Budget | None, ...] | None = None
    total: int | None = None

    @classmethod
    def parse(cls, value: object) -> BudgetRequest:
        """Parse the value a client sent as ``visual_token_budget``.

        Raises:
            BudgetError: The value is not a budget. The message gives the value, the limits and the next step.
        """
        if isinstance(value, list | tuple):
            if not 1 <= len(value) <= MAX_IMAGES:
                raise _error(value, f"a list of 1 to {MAX_IMAGES} entries, one per image or video")
            return cls(each=tuple(Budget.parse(entry, f"{FIELD}[{i}]") for i, entry in enumerate(value)))
        if isinstance(value, dict) and "per_frame" not in value:
            return cls(total=_tokens_of(value, "total", FIELD))
        return cls(each=Budget.parse(value))

    def printed(self) -> object:
        """Return the JSON value that ``parse`` turns into this request."""
        if self.total is not None:
            return {"total": self.total}
        if isinstance(self.each, tuple):
            return [AUTO if budget is None else budget.printed() for budget in self.each]
        return AUTO if self.each is None else self.each.printed()

    def check_media(self, kinds: Sequence[str]) -> None:
        """Raise ``BudgetError`` if this does not fit the images and videos of a prompt.

        Args:
            kinds: ``IMAGE`` or ``VIDEO`` for each, in order of appearance.
        """
        images, videos = kinds.count(IMAGE), kinds.count(VIDEO)
        there = f"{images} image(s)" + (f" and {videos} video(s)" if videos else "")
        if isinstance(self.each, tuple) and len(self.each) != len(kinds):
            raise BudgetError(
                f"{FIELD} has {len(self.each)} entries, but the prompt has {there}. Send one entry per image or "
                "video in order of appearance, or one value for all. In batched chat and scoring requests, the "
                "list must match the images and videos of each prompt.",
                reason="images",
            )
        if self.total is not None and len(kinds) > self.total:
            raise BudgetError(
                f"{FIELD} has a total of {self.total} tokens, but the request has {there} and each keeps "
                f"at least one token. Send a total of {len(kinds)} or more.",
                reason="images",
            )
        self._check_frames(kinds, there)

    def _check_frames(self, kinds: Sequence[str], there: str) -> None:
        for i, budget in enumerate(self.each if isinstance(self.each, tuple) else ()):
            if budget is not None and budget.per_frame is not None and kinds[i] != VIDEO:
                raise BudgetError(
                    f"{FIELD}[{i}] is {budget.printed()}, but an image has no frames. Send tokens or a share.",
                    reason="images",
                )
        # A client that sends it with every request may also send plain text, as with a number of tokens.
        if isinstance(self.each, Budget) and self.each.per_frame is not None and kinds and VIDEO not in kinds:
            raise BudgetError(
                f"{FIELD} is {self.printed()}, but the prompt has {there} and no video. Send tokens or a share.",
                reason="images",
            )

    @property
    def form(self) -> str:
        """The kind of value the client sent: tokens, share, full, auto, per_frame, list or total."""
        if self.total is not None:
            return "total"
        if isinstance(self.each, tuple):
            return "list"
        if self.each is None:
            return AUTO
        if self.each.tokens is not None:
            return "tokens"
        if self.each.per_frame is not None:
            return "per_frame"
        return FULL if self.each.share == 1 else "share"

    def for_medium(self, index: int, kind: str) -> Budget | None:
        """Return the budget of one image or video; ``None`` for ``"auto"``. A total has none for each.

        Args:
            index: Its place among the images and videos, in order of appearance.
            kind: ``IMAGE`` or ``VIDEO``.
        """
        if isinstance(self.each, tuple):
            return self.each[index]
        if kind != VIDEO and self.each is not None and self.each.per_frame is not None:
            return None
        return self.each


def number_of(value: object) -> int | Fraction | None:
    """Return the exact number that a client sent as a number or as text; ``None`` if it is not a number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and isfinite(value):
        number = Fraction(repr(value))  # the decimal that was sent, not the nearest binary fraction
    elif isinstance(value, str) and _NUMBER.fullmatch(value):
        number = Fraction(value)
    else:
        return None
    return number.numerator if number.denominator == 1 else number


def from_text(text: str) -> object:
    """Return the value of a command-line option or an environment variable, where ``"64"`` is a number.

    Args:
        text: Tokens, a share, or a word. Anything but a number is returned unchanged; ``Budget.parse`` checks it.
    """
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _tokens_of(value: dict[Any, Any], key: str, name: str) -> int:
    """Return the number of tokens in an object with one key."""
    tokens = number_of(value.get(key))
    if set(value) != {key} or not isinstance(tokens, int):
        forms = '{"total": tokens} or {"per_frame": tokens}' if name == FIELD else '{"per_frame": tokens}'
        raise _error(value, f"{forms} if it is an object", name)
    if not 1 <= tokens <= MAX_BUDGET_TOKENS:
        raise _error(value, f'from 1 to {MAX_BUDGET_TOKENS} tokens in "{key}"', name)
    return tokens


def _error(value: object, requirement: str, name: str = FIELD) -> BudgetError:
    return BudgetError(f"{name} must be {requirement}, got {shown(value)} ({json_type(value)}). {_NEXT_STEP}")


def shown(value: object, limit: int = 80) -> str:
    """Return a value as error messages show it, shortened: a client's input can be of any size."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer inside is too long to print, or lists are nested too deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "…"


def json_type(value: object) -> str:
    """Return what JSON calls the type of a value, for error messages."""
    names = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        dict: "object",
        list: "array",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
