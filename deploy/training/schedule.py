"""The training schedule: four stages, as shares of the total time."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of training.

    Args:
        name: Name for the log.
        share: Share of the total time.
        batch: Scenes per step at the smallest number of patches; steps with more patches have fewer scenes.
        keep: Numbers of patches that a step draws from; a repeated number is drawn more often.
        uses: How often each scene is used.
        tower: Learning rate of the tower at the start and the end, as shares of the full rate.
        reader: The same for the projector and the language model.
        aux: Weight of the tower's auxiliary loss.
        gaze: Weight of the attention and position losses.
        pairs: Share of steps with questions about two images.
    """

    name: str
    share: float
    batch: int
    keep: tuple[int, ...]
    uses: int
    tower: tuple[float, float]
    reader: tuple[float, float]
    aux: float = 0.0
    gaze: float = 0.0
    pairs: float = 0.0


_KEEP = (96, 96, 144, 144, 208, 288)
STAGES = (
    # The tower learns from its auxiliary tasks, on a quarter of the patches: 3.7 times as many scenes per minute.
    Stage("see", 0.29, 32, (144,), 4, tower=(1.0, 0.5), reader=(0.0, 0.0), aux=1.0),
    # The reader learns questions and attention while the tower is frozen: many small steps.
    Stage("read", 0.19, 8, (144,), 4, tower=(0.0, 0.0), reader=(1.0, 1.0), gaze=0.5),
    # Both, with different numbers of patches: with a single number, counting would adapt to it.
    Stage("both", 0.29, 24, _KEEP, 2, tower=(0.5, 0.25), reader=(1.0, 0.5), aux=0.3, gaze=0.5, pairs=0.08),
    # All patches, as in serving, and sometimes fewer.
    Stage("full", 0.23, 24, (576, 576, 576, 192), 2, (0.25, 0.01), (0.5, 0.02), aux=0.3, gaze=0.5, pairs=0.08),
)
_WARM_UP = 0.03  # share of a stage


def stage_at(progress: float) -> tuple[Stage, float]:
    """Return the stage at a share of the total time, and the share of the stage that has passed."""
    begin = 0.0
    for stage in STAGES:
        if progress < begin + stage.share:
            return stage, (progress - begin) / stage.share
        begin += stage.share
    return STAGES[-1], 1.0


def rates_at(stage: Stage, within: float) -> dict[str, float]:
    """Return the learning rates of `tower` and `reader` as shares of the full rate; frozen parts are left out."""
    warm = min(1.0, within / _WARM_UP)
    fall = (1 + math.cos(math.pi * min(1.0, within))) / 2
    parts = {"tower": stage.tower, "reader": stage.reader}
    rates = {part: warm * (end + (start - end) * fall) for part, (start, end) in parts.items() if start > 0}
    return {part: max(rate, 1e-4) for part, rate in rates.items()}
