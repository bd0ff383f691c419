"""The server's settings: one frozen object, read from ``PROMPRUNE_*`` variables.

Variables, because vLLM starts several processes and all of them inherit the environment; the command line
writes the same variables.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from promprune_vllm.errors import SettingsError

if TYPE_CHECKING:
    from promprune_vllm.core.registry import Selector

METHOD_VARIABLE = "PROMPRUNE_METHOD"
METHOD_OPTIONS_VARIABLE = "PROMPRUNE_METHOD_OPTIONS"


class Settings(BaseSettings):
    """What the operator chose.

    Args:
        method: Name of the method that selects tokens.
        method_options: Its options, as a JSON object in the variable.
    """

    model_config = SettingsConfigDict(env_prefix="PROMPRUNE_", frozen=True, extra="ignore")

    method: str = "promprune"
    method_options: dict[str, Any] = Field(default_factory=dict)

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
        return settings

    def selector(self) -> Selector:
        """Return the method with its options set."""
        from promprune_vllm.core.registry import get_method

        return get_method(self.method, **self.method_options)

    def digest(self) -> str:
        """Identify everything that decides *which* tokens are kept, defaults included.

        It is part of every pruned image's cache key, so that a cache shared between servers, or kept over a
        restart with other options, never serves tokens selected another way.
        """
        from promprune_vllm.core.registry import options_of

        content = json.dumps([self.method, options_of(self.selector())], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:32]
