"""The server's settings: one frozen object, read from ``PROMPRUNE_*`` variables.

Variables, because vLLM starts several processes and all of them inherit the environment; the command line
writes the same variables.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from promprune_vllm.core.budget import Budget, from_text
from promprune_vllm.core.policy import BudgetPolicy, OutOfRange
from promprune_vllm.errors import BudgetError, SettingsError

if TYPE_CHECKING:
    from promprune_vllm.core.registry import Selector

PREFIX = "PROMPRUNE_"
FLAG = "--visual-token-"
Tiles = Literal["own", "base", "merged"]
Calibration = Mapping[str, Mapping[str, Any]]


def environment() -> tuple[tuple[str, str], ...]:
    """Return the variables that settings are read from, as they are now."""
    return tuple((name, value) for name, value in os.environ.items() if name.upper().startswith(PREFIX))


class Switch(BaseSettings):
    """Whether the plugin does anything. Read alone, so that no other variable can keep it from being off."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    enabled: bool = Field(
        default=True, description="turn the plugin on; false leaves vLLM as it is without the plugin"
    )


def is_enabled() -> bool:
    """Return whether ``PROMPRUNE_ENABLED`` leaves the plugin on.

    Raises:
        SettingsError: It is neither true nor false.
    """
    try:
        return Switch().enabled
    except ValidationError as error:
        (wrong,) = error.errors()
        raise SettingsError(f"{PREFIX}ENABLED must be true or false, got {wrong['input']!r}.") from error


class Settings(Switch):
    """What the operator chose. Descriptions are those of ``promprune serve --help``."""

    budget: str | None = Field(
        default=None,
        description='budget of requests that set none: tokens per image, "25%" or "full" (default: full)',
    )
    min: int = Field(default=1, description="minimum tokens kept per image")
    max: int | None = Field(default=None, description="maximum tokens kept per image (default: no limit)")
    low: int = Field(default=64, description='tokens kept per image with "detail": "low"')
    out_of_range: OutOfRange = Field(
        default="clamp", description="clamp a budget to the limits above, or refuse it with HTTP 400"
    )
    detail: bool = Field(
        default=False,
        description="honor OpenAI's image_url.detail: low, high (every token) or auto; a budget takes precedence",
    )
    adapt_to_load: bool = Field(
        default=False, description='under load, reduce "auto" and the default budget step by step'
    )
    adapt_to_content: bool = Field(
        default=False, description='reduce "auto" and the default budget for images with little content'
    )
    floor: int = Field(default=64, description="minimum tokens per image after adapting to load or content")
    method: str = Field(default="promprune", description="method that selects tokens; see `promprune methods`")
    method_options: dict[str, Any] = Field(
        default_factory=dict, description="options of that method as JSON, such as '{\"mu\": 0.42}'"
    )
    allow_methods: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="other methods a request may select with visual_token_method, comma-separated"
    )
    kernels: Literal["fast", "reference"] = Field(
        default="fast", description="select tokens with the device's fast kernels, or with the float64 reference"
    )
    endpoints: bool = Field(
        default=True,
        description="serve the routes under /v1/visual_tokens and the inspector; headers and usage do not depend "
        "on it",
    )
    inspector: bool = Field(
        default=True,
        description="serve the page /promprune and POST /v1/visual_tokens/inspect, which show what is kept",
    )
    tiles: Tiles = Field(
        default="own",
        description="how a tiled image is pruned: each tile by its own statistics (as in the paper), each by the "
        "entropy of the base image, or all tiles merged into one selection",
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
            SettingsError: A value of the wrong form, limits that contradict each other, an unknown method, or an
                option it refuses.
        """
        from pydantic_settings import SettingsError as UnreadableValue

        try:
            settings = cls()
        except (ValidationError, UnreadableValue) as error:
            raise SettingsError(
                f"The {PREFIX}* variables cannot be read: {error}. "
                f'{PREFIX}METHOD_OPTIONS is a JSON object such as {{"mu": 0.42}}.'
            ) from error
        settings.policy()
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
        """Every method a request may choose, the configured one first. Its index travels with each image."""
        return tuple(dict.fromkeys((self.method, *self.allow_methods)))

    def policy(self) -> BudgetPolicy:
        """Return the limits and defaults of budgets."""
        try:
            return BudgetPolicy(
                default=None if self.budget is None else _budget(self.budget),
                minimum=self.min,
                maximum=self.max,
                low=self.low,
                out_of_range=self.out_of_range,
                floor=self.floor,
            )
        except BudgetError as error:
            raise SettingsError(f"The {PREFIX}* limits cannot be honoured: {error}") from error

    def selector(self, calibration: Calibration = MappingProxyType({}), method: str | None = None) -> Selector:
        """Return a method with its options set.

        Args:
            calibration: Method -> options measured for one model family; the operator's own come first.
            method: The configured one by default. Others run with their defaults.
        """
        from promprune_vllm.core.registry import get_method

        name = method or self.method
        own = self.method_options if name == self.method else {}
        return get_method(name, **{**calibration.get(name, {}), **own})

    def digest(self, calibration: Calibration = MappingProxyType({}), method: str | None = None) -> str:
        """Identify everything that decides *which* tokens are kept, defaults and calibration included.

        It is part of every pruned image's cache key, so that a cache shared between servers, or kept over a
        restart with other options, never serves tokens selected another way.
        """
        from promprune_vllm.core.registry import options_of

        selector = self.selector(calibration, method)
        content = json.dumps(
            [selector.name, options_of(selector), self.tiles, self.kernels], sort_keys=True, default=str
        )
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def _budget(text: str) -> Budget:
    """Read a server's default budget."""
    budget = Budget.parse(from_text(text))
    if budget is None:
        raise BudgetError('"auto" is what asks for the default: it cannot be the default itself.')
    return budget
