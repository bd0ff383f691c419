"""The server's settings: one frozen object, read from ``PROMPRUNE_*`` variables.

Variables, because vLLM starts several processes and all of them inherit the environment; the command line
writes the same variables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from promprune_vllm.errors import SettingsError

if TYPE_CHECKING:
    from promprune_vllm.core.registry import Selector

METHOD_VARIABLE = "PROMPRUNE_METHOD"
METHOD_OPTIONS_VARIABLE = "PROMPRUNE_METHOD_OPTIONS"
TILES_VARIABLE = "PROMPRUNE_TILES"
Tiles = Literal["own", "base", "merged"]
Calibration = Mapping[str, Mapping[str, Any]]


class Settings(BaseSettings):
    """What the operator chose.

    Args:
        method: Name of the method that selects tokens.
        method_options: Its options, as a JSON object in the variable.
        tiles: How an image that is cut into tiles is pruned. ``own``: each tile on its own statistics, as in the
            paper. ``base``: likewise, but the entropy of the whole, downsized image splits the budget of every
            tile. ``merged``: one selection over all tiles together.
    """

    model_config = SettingsConfigDict(env_prefix="PROMPRUNE_", frozen=True, extra="ignore")

    method: str = "promprune"
    method_options: dict[str, Any] = Field(default_factory=dict)
    tiles: Tiles = "own"

    @classmethod
    def from_environment(cls) -> Settings:
        """Read and check the settings.

        Raises:
            SettingsError: A value of the wrong form, an unknown method, or an option it refuses.
        """
        from pydantic_settings import SettingsError as UnreadableValue

        try:
            settings = cls()
        except (ValidationError, UnreadableValue) as error:
            raise SettingsError(
                f"The PROMPRUNE_* variables cannot be read: {error}. "
                f'{METHOD_OPTIONS_VARIABLE} is a JSON object such as {{"mu": 0.42}}.'
            ) from error
        settings.selector()
        if settings.tiles == "base" and settings.method != "promprune":
            raise SettingsError(
                f"{TILES_VARIABLE}=base shares the entropy of method 'promprune' between the tiles of an image; "
                f"method {settings.method!r} has none. Use own or merged."
            )
        return settings

    def selector(self, calibration: Calibration = MappingProxyType({})) -> Selector:
        """Return the method with its options set.

        Args:
            calibration: Method -> options measured for one model family; the operator's own come first.
        """
        from promprune_vllm.core.registry import get_method

        return get_method(self.method, **{**calibration.get(self.method, {}), **self.method_options})

    def digest(self, calibration: Calibration = MappingProxyType({})) -> str:
        """Identify everything that decides *which* tokens are kept, defaults and calibration included.

        It is part of every pruned image's cache key, so that a cache shared between servers, or kept over a
        restart with other options, never serves tokens selected another way.
        """
        from promprune_vllm.core.registry import options_of

        content = json.dumps(
            [self.method, options_of(self.selector(calibration)), self.tiles], sort_keys=True, default=str
        )
        return hashlib.sha256(content.encode()).hexdigest()[:32]
