"""How the budget of a video is split over its frames, where the frames' sizes alone decide it."""

from __future__ import annotations

from itertools import pairwise


def split_over_frames(keep: int, frames: int, size: int) -> tuple[int, ...]:
    """Return how many tokens each frame keeps: as even as possible, and what is left over is spread over time.

    Of a video of 7 frames, one token is one of the middle frame.

    Args:
        keep: Tokens to keep in all, ``0 <= keep <= frames * size``.
        frames: Frames of the video, at least one. What a model merges into one grid of tokens is one frame.
        size: Tokens of each frame before pruning.

    Returns:
        ``frames`` counts between ``keep // frames`` and one more, which sum to ``keep``.

    Raises:
        ValueError: ``keep`` is outside its limits.
    """
    if frames < 1 or not 0 <= keep <= frames * size:
        raise ValueError(f"Cannot split {keep} tokens over {frames} frames of {size} tokens.")
    ends = [(2 * keep * frame + frames) // (2 * frames) for frame in range(frames + 1)]
    return tuple(end - start for start, end in pairwise(ends))
