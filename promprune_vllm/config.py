"""The server's settings: one frozen object, read from ``PROMPRUNE_*`` environment variables.

Environment variables, because vLLM starts several processes and all of them inherit the environment. The
command line sets the same variables.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from promprune_vllm.core.audit import parse_share
from promprune_vllm.core.budget import Budget, from_text
from promprune_vllm.core.escalation import BELOW, WINDOW, Escalation
from promprune_vllm.core.policy import BudgetPolicy, MediaPolicy, OutOfRange
from promprune_vllm.core.target import AUDITED, parse_target
from promprune_vllm.errors import BudgetError, SettingsError

if TYPE_CHECKING:
    from promprune_vllm.core.registry import Selector

PREFIX = "PROMPRUNE_"
FLAG = "--visual-token-"
Tiles = Literal["own", "base", "merged"]
Calibration = Mapping[str, Mapping[str, Any]]


def environment() -> tuple[tuple[str, str], ...]:
    """Return the ``PROMPRUNE_*`` variables that are set now, with their values."""
    return tuple((name, value) for name, value in os.environ.items() if name.upper().startswith(PREFIX))


class Switch(BaseSettings):
    """The plugin's switches. Read on their own, so that an invalid setting cannot prevent switching it off."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    enabled: bool = Field(
        default=True, description="enable the plugin; if false, vLLM runs as if it were not installed"
    )
    untested_vllm: bool = Field(
        default=False,
        description="on a vLLM that this release was not tested with, run everything even where vLLM's code has "
        "changed; it may select wrong tokens or fail",
    )


def is_enabled() -> bool:
    """Return whether the plugin is enabled: true unless ``PROMPRUNE_ENABLED`` says otherwise.

    Raises:
        SettingsError: ``PROMPRUNE_ENABLED`` or ``PROMPRUNE_UNTESTED_VLLM`` is neither true nor false.
    """
    return _switch().enabled


def allows_untested_vllm() -> bool:
    """Return whether code of vLLM that has changed since our tests is to be ignored; see ``is_enabled``."""
    return _switch().untested_vllm


def _switch() -> Switch:
    try:
        return Switch()
    except ValidationError as error:
        details = error.errors()[0]
        name = str(details["loc"][0]).upper()
        raise SettingsError(f"{PREFIX}{name} must be true or false, got {details['input']!r}.") from error


class Settings(Switch):
    """All settings. The descriptions are the help of ``promprune serve``."""

    budget: str | None = Field(
        default=None,
        description='tokens kept per image if a request sets no budget: a number, "25%" or "full" (default: full)',
    )
    min: int = Field(default=1, description="minimum tokens kept per image")
    max: int | None = Field(default=None, description="maximum tokens kept per image (default: no limit)")
    video_budget: str | None = Field(
        default=None,
        description='tokens kept per video if a request sets no budget: a number, "25%" or "full" (default: full)',
    )
    video_min: int = Field(default=1, description="minimum tokens kept per video")
    video_max: int | None = Field(default=None, description="maximum tokens kept per video (default: no limit)")
    low: int = Field(
        default=64, description='tokens kept per image sent with "detail": "low", if --visual-token-detail is set'
    )
    out_of_range: OutOfRange = Field(
        default="clamp",
        description="clamp a budget below min or above max to that limit, or refuse it with HTTP 400",
    )
    detail: bool = Field(
        default=False,
        description="honor OpenAI's image_url.detail (low, high: all tokens, or auto); a budget overrides it",
    )
    adapt_to_load: bool = Field(
        default=False,
        description='keep fewer tokens under load, in steps, for "auto" and for requests without a budget',
    )
    adapt_to_content: bool = Field(
        default=False, description='keep fewer tokens of plain images for "auto" and for requests without a budget'
    )
    floor: int = Field(
        default=64, description="adapting to load or content keeps at least this many tokens per image or video"
    )
    escalate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="answer again with more tokens if the first answer's confidence is below this probability, "
        "unless a request says otherwise (default: never)",
    )
    escalate_to: str = Field(
        default="full", description='tokens per image or video in the second try: a number, "25%" or "full"'
    )
    escalate_window: int = Field(
        default=WINDOW, ge=1, description="tokens of an answer that decide; a stream starts after them"
    )
    audit: str | None = Field(
        default=None,
        description="share of the pruned requests (with a target, of all it serves) whose answers are compared "
        'with those of all visual tokens, while the server is not busy, such as "1%" (default: none, or 5%)',
    )
    target: str | None = Field(
        default=None,
        description='share of answers that must match those with all visual tokens, such as "99%": images of '
        "requests without a budget keep the fewest tokens that audits prove sufficient (default: off)",
    )
    method: str = Field(default="promprune", description="method that selects tokens; see `promprune methods`")
    method_options: dict[str, Any] = Field(
        default_factory=dict, description="options of --visual-token-method as JSON, such as '{\"mu\": 0.42}'"
    )
    allow_methods: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="more methods that requests may set as visual_token_method, separated by commas"
    )
    kernels: Literal["fast", "reference"] = Field(
        default="fast", description="select tokens with the device's fast kernels or with the float64 reference"
    )
    endpoints: bool = Field(
        default=True,
        description="serve /v1/visual_tokens and the inspector; if off, replies still have headers and usage",
    )
    inspector: bool = Field(
        default=True,
        description="serve the page /promprune and POST /v1/visual_tokens/inspect, which show kept tokens",
    )
    feature_cache_gb: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="GiB of host memory in each worker for encoded images, so that another budget, method or "
        "question does not encode an image again (default: 0, off)",
    )
    tiles: Tiles = Field(
        default="own",
        description="how to prune an image split into tiles: each tile by its own statistics (own, as in the "
        "paper), each by the entropy of the base image (base), or all in one selection (merged)",
    )

    @field_validator("allow_methods", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value
        )

    @classmethod
    def from_environment(cls) -> Settings:
        """Read and check the settings.

        Raises:
            SettingsError: A value is malformed, limits contradict each other, a method is unknown or refuses an
                option.
        """
        from pydantic_settings import SettingsError as UnreadableValue

        try:
            settings = cls()
        except (ValidationError, UnreadableValue) as error:
            raise SettingsError(
                f"The {PREFIX}* variables cannot be read: {error}. "
                f'{PREFIX}METHOD_OPTIONS is a JSON object such as {{"mu": 0.42}}.'
            ) from error
        settings.media_policy()
        settings.escalation()
        settings.audited_share()
        settings.agreement()
        for method in settings.allowed:
            settings.selector(method=method)
        if settings.tiles == "base" and settings.allowed != ("promprune",):
            raise SettingsError(
                f"{PREFIX}TILES=base shares the entropy of method 'promprune' between the tiles of an image; "
                f"{', '.join(repr(name) for name in settings.allowed if name != 'promprune')} has none. "
                "Use own or merged."
            )
        return settings

    @property
    def allowed(self) -> tuple[str, ...]:
        """Methods that requests may choose, the configured one first. Each image carries its method's index."""
        return tuple(dict.fromkeys((self.method, *self.allow_methods)))

    @property
    def prunes_by_default(self) -> bool:
        """Whether images or videos of requests without a budget may be pruned."""
        has_default = {self.budget, self.video_budget} - {None, "full"} != set()
        return has_default or self.detail or self.adapt_to_load or self.adapt_to_content or self.target is not None

    def media_policy(self) -> MediaPolicy:
        """Return the limits and defaults for budgets of images, and those for videos, which are set apart."""
        return MediaPolicy(self._policy(""), self._policy("video_"))

    def _policy(self, medium: str) -> BudgetPolicy:
        """Return the policy of the settings whose names start with ``medium``."""
        names = [f"{medium}{name}" for name in ("budget", "min", "max")]
        budget, minimum, maximum = (getattr(self, name) for name in names)
        with _honored(*names, "low", "floor"):
            return BudgetPolicy(
                default=None if budget is None else _budget(budget),
                minimum=minimum,
                maximum=maximum,
                low=self.low,
                out_of_range=self.out_of_range,
                floor=self.floor,
            )

    def escalation(self) -> Escalation:
        """Return when and how answers are asked for again where a request does not say."""
        with _honored("escalate_to"):
            return Escalation(self.escalate or BELOW, _budget(self.escalate_to), self.escalate_window)

    def audited_share(self) -> float:
        """Return the share of the requests that are audited, 0 for none."""
        with _honored("audit"):
            return parse_share(AUDITED if self.audit is None and self.target is not None else self.audit)

    def agreement(self) -> float | None:
        """Return the share of the answers that are to stay the same, ``None`` without a target."""
        with _honored("target"):
            return None if self.target is None else parse_target(self.target, self.budget)

    def selector(self, calibration: Calibration = MappingProxyType({}), method: str | None = None) -> Selector:
        """Return a method with its options set.

        Args:
            calibration: Method -> options measured for one model family; the operator's options override them.
            method: The configured method if left out. Other methods run with their default options.
        """
        from promprune_vllm.core.registry import get_method, methods

        name = method or self.method
        own = self.method_options if name == self.method else {}
        registered = methods().get(name)
        measured = {} if registered is None else calibration.get(registered.calibrated_as, {})
        return get_method(name, **{**measured, **own})

    def digest(self, calibration: Calibration = MappingProxyType({}), method: str | None = None) -> str:
        """Hash everything that decides *which* tokens are kept, including defaults and calibration.

        The hash is part of every pruned image's cache key. A cache shared between servers, or kept across a
        restart with different options, therefore never serves tokens that were selected differently.
        """
        from promprune_vllm.core.registry import options_of

        selector = self.selector(calibration, method)
        content = json.dumps(
            [selector.name, options_of(selector), self.tiles, self.kernels], sort_keys=True, default=str
        )
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@contextmanager
def _honored(*names: str) -> Iterator[None]:
    try:
        yield
    except BudgetError as error:
        variables = ", ".join(f"{PREFIX}{name.upper()}" for name in names)
        raise SettingsError(f"{'One of ' * (len(names) > 1)}{variables} cannot be honored: {error}") from error


def _budget(text: str) -> Budget:
    """Parse the server's default budget."""
    if text.lstrip().startswith("{"):
        raise BudgetError(
            f'A server\'s own budget is tokens, a share or "full", got {text}. Objects are for requests. A share '
            'such as "25%" also grows with the frames of a video.'
        )
    budget = Budget.parse(from_text(text))
    if budget is None:
        raise BudgetError('"auto" means the default, so it cannot be the default itself.')
    return budget
