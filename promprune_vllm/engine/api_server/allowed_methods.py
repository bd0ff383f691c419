"""The methods that requests to this server may name, with their options for the served model."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from promprune_vllm.config import Settings, environment
from promprune_vllm.core.budget import FIELD, METHOD_FIELD, VIDEO, shown
from promprune_vllm.core.features import Need
from promprune_vllm.core.registry import Selector, methods
from promprune_vllm.engine import families
from promprune_vllm.errors import BudgetError, SettingsError


@dataclass(frozen=True, slots=True)
class AllowedMethods:
    """The settings of this process and the methods that they allow.

    Args:
        settings: The server's settings.
        selectors: One per name in ``settings.allowed``; the first is the default.
        digests: One per method; identifies the method and its options in cache keys.
    """

    settings: Settings
    selectors: tuple[Selector, ...]
    digests: tuple[str, ...]

    @classmethod
    def of(cls, model_config: Any) -> AllowedMethods:
        """Return the allowed methods with the options calibrated for a model.

        Args:
            model_config: vLLM's ``ModelConfig``.
        """
        calibration = families.calibration(model_config)
        calibrated = json.dumps({name: dict(options) for name, options in calibration.items()}, sort_keys=True)
        return _configured(environment(), calibrated)

    def index(self, name: object) -> int:
        """Return the index of a method among those allowed.

        Args:
            name: The method's name, ``None`` for the default.

        Raises:
            BudgetError: The method is not allowed, or ``name`` is not a string.
        """
        allowed = self.settings.allowed
        if name is None:
            return 0
        if not isinstance(name, str) or name not in allowed:
            raise BudgetError(
                f"{METHOD_FIELD} must be one of {', '.join(allowed)}, got {shown(name)}. The server's "
                "operator allows more with --visual-token-allow-methods.",
                param=METHOD_FIELD,
                reason="method",
            )
        return allowed.index(name)

    def text_between(self, index: int, kind: str, size: Any, kept: int) -> int:
        """Return how many tokens of text enter among the kept tokens of a video, as embeddings like them.

        Where text is between frames and a method decides how many tokens each frame keeps, all of that text does.

        Args:
            index: The method's index.
            kind: What is to be pruned, ``IMAGE`` or ``VIDEO``.
            size: Of a video, its ``VideoShape``.
            kept: Tokens to keep, fewer than it has.

        Raises:
            BudgetError: The method compares frames, and there are none to compare; or a video would take more
                embeddings than unpruned, for which vLLM has made no room.
        """
        if not self.selectors[index].over_frames:
            return 0
        if kind != VIDEO:
            raise self._frames_error(index, kind, "an image has none")
        if size.frames == 1:
            raise self._frames_error(index, kind, "this one has a single frame")
        if kept > size.total - size.between:
            raise self._room_error(index, size, kept)
        return int(size.between)

    def _room_error(self, index: int, size: Any, kept: int) -> BudgetError:
        most = size.total - size.between
        cure = f"Send a {FIELD} that keeps at most {most}" if most > 0 else "No budget is small enough"
        return BudgetError(
            f"Method {self.selectors[index].name!r} cannot keep {kept} of the {size.total} tokens of this video. "
            f"It decides how many each frame keeps, so the {size.between} tokens of text between the frames "
            f"become embeddings too, and all together may not be more than {size.total}. {cure}; send another "
            f'{METHOD_FIELD} ({self._others()}), or "full" for the video.',
            reason="limits",
        )

    def _frames_error(self, index: int, kind: str, why: str) -> BudgetError:
        return BudgetError(
            f"Method {self.selectors[index].name!r} compares the frames of a video, and {why}. Send another "
            f'{METHOD_FIELD} ({self._others()}), or "full" for the {kind}.',
            param=METHOD_FIELD,
            reason="method",
        )

    def _others(self) -> str:
        names = [each.name for each in self.selectors if not each.over_frames]
        return ", ".join(names) or "this server allows no other"

    def needs_text(self) -> bool:
        """Return whether any of the methods uses the user's text."""
        return any(Need.TEXT in method.needs for method in self.selectors)

    def require_supplied(self, supplied: Need, architecture: str) -> None:
        """Raise ``SettingsError`` unless the model can capture all features that the methods need.

        Args:
            supplied: Features that the model can capture.
            architecture: The model's name, for the message.
        """
        for method in self.selectors:
            missing = method.needs & ~supplied
            if missing:
                names = ", ".join(need.name or "" for need in missing)
                images = methods(over_frames=False)
                usable = [name for name, each in images.items() if not each.needs & ~supplied]
                raise SettingsError(
                    f"Method {method.name!r} needs {names}, which cannot be captured from {architecture}. "
                    f"Methods for this model: {', '.join(usable)}."
                )


@functools.lru_cache(maxsize=8)
def _configured(_: tuple[tuple[str, str], ...], calibrated: str) -> AllowedMethods:
    """Return the methods for an environment; cached, since vLLM creates a processor for every request with images.

    Args:
        calibrated: Result of ``families.calibration`` as JSON, which is hashable.
    """
    settings = Settings.from_environment()
    calibration = json.loads(calibrated)
    return AllowedMethods(
        settings,
        tuple(settings.selector(calibration, method) for method in settings.allowed),
        tuple(settings.digest(calibration, method) for method in settings.allowed),
    )
