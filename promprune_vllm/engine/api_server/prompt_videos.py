"""The videos of a prompt. How many tokens one has, the Hugging Face processor decides: it samples and resizes.

So a video that may lose tokens is processed before the plan is made, and what the processor made of it is used
when vLLM asks for it. Its shape is remembered by its cache key, so this happens once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from promprune_vllm.core.budget import VIDEO
from promprune_vllm.engine.api_server.named_images import PromptMedia


class VideoShape(NamedTuple):
    """What a budget needs to know about a video.

    Args:
        frames: Frames as the model has them, each with its own grid of tokens: Qwen-VL's and GLM-V's towers merge
            two frames into one.
        total: Visual tokens of all frames, before pruning.
        positions: Positions that it takes in the model's rotary table.
        between: Tokens of text between its frames.
    """

    frames: int
    total: int
    positions: int
    between: int = 0


class PromptVideos(PromptMedia):
    """The videos of one prompt.

    Args:
        items: vLLM's ``VideoProcessorItems``.
        uuids: The client's uuid of each, or ``None``.
        cache: vLLM's processor cache, or ``None`` if it is off.
        keys: vLLM's own cache key of each; none if nothing is pruned.
    """

    kind = VIDEO

    def __init__(self, items: Any, uuids: Sequence[object] | None, cache: Any, keys: Sequence[str]) -> None:
        super().__init__(items, uuids, cache, [(VIDEO, key) for key in keys] or [None] * items.get_count())
        self._cache, self._own_keys = cache, keys
        self._found: dict[int, VideoShape] = {}

    @property
    def sizes(self) -> list[VideoShape | None]:
        """The shape of each video that is known."""
        remembered = (None if each is None else VideoShape(*each.size) for each in self._remembered)
        return [self._found.get(i, shape) for i, shape in enumerate(remembered)]

    @property
    def to_process(self) -> list[int]:
        """Which videos to process before the plan: those that may lose tokens, of a number that is not known.

        With them go those that vLLM asks for anyway: all that are not in its processor cache. What it asks for is
        then mostly what was processed. Where it is not, vLLM processes again what it asks for: if one whose shape
        is remembered now keeps another number of tokens, for instance, a new one beside it is processed twice.
        """
        unknown = [i for i, shape in enumerate(self.sizes) if shape is None and self._may_lose_tokens[i]]
        return [i for i in range(self.get_count()) if i in unknown or (unknown and self._is_asked_for(i))]

    def _is_asked_for(self, index: int) -> bool:
        """Whether vLLM has to process a video, as far as that is known before there is a plan."""
        if self._is_named(index):
            return False
        if self._cache is None:
            return True
        # One that may lose tokens has another key for each number of them.
        return not self._may_lose_tokens[index] and not self._cache.is_cached([self._own_keys[index]])[0]

    def unsure(self, keys: Sequence[str], cache: Any) -> list[int]:
        """Return which videos that may lose tokens may have another shape than the one remembered.

        A client may give the uuid of a video to another one, once the first is no longer in the cache.

        Args:
            keys: The cache key of each.
            cache: vLLM's processor cache.
        """
        return [
            i
            for i, key in enumerate(keys)
            if self._may_lose_tokens[i]
            and i not in self._found
            and self._uuids[i] is not None
            and not self._is_named(i)
            and not cache.is_cached([key])[0]
        ]

    def learn(self, index: int, shape: VideoShape) -> None:
        """Note the shape of a video that was processed."""
        self._found[index] = shape
