"""What is trained when: four stages, as shares of the time there is."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training.

    Args:
        name: For the log.
        share: Of the whole time.
        batch: Scenes of a step with the fewest patches; a step with more has fewer.
        keep: How many patches a step may take; one that stands here twice, twice as often.
        uses: How often a scene is used.
        tower: Learning rate of the tower at the start and the end, as shares of the full one.
        reader: The same of the projector and the language model.
        aux: Weight of the tower's own tasks.
        gaze: Weight of looking at what a word names.
        pairs: Share of the steps that ask about two images.
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
    # The tower learns to see by its own tasks, on a quarter of the patches: 3.7 times as many scenes in a minute.
    Stage("see", 0.29, 32, (144,), 4, tower=(1.0, 0.5), reader=(0.0, 0.0), aux=1.0),
    # The reader learns what questions are, and where to look, while the tower stands still: many small steps.
    Stage("read", 0.19, 8, (144,), 4, tower=(0.0, 0.0), reader=(1.0, 1.0), gaze=0.5),
    # Both, on different shares of the patches: with one share only, counting is calibrated to it.
    Stage("both", 0.29, 24, _KEEP, 2, tower=(0.5, 0.25), reader=(1.0, 0.5), aux=0.3, gaze=0.5, pairs=0.08),
    # All patches, as they are served, and now and then fewer.
    Stage("full", 0.23, 24, (576, 576, 576, 192), 2, (0.25, 0.01), (0.5, 0.02), aux=0.3, gaze=0.5, pairs=0.08),
)
_WARM_UP = 0.03  # of a stage


def stage_at(progress: float) -> tuple[Stage, float]:
    """The stage at this share of the time, and how much of it has passed."""
    begin = 0.0
    for stage in STAGES:
        if progress < begin + stage.share:
            return stage, (progress - begin) / stage.share
        begin += stage.share
    return STAGES[-1], 1.0


def rates_at(stage: Stage, within: float) -> dict[str, float]:
    """Learning rates of `tower` and `reader` as shares of the full one; a part that stands still is left out."""
    warm = min(1.0, within / _WARM_UP)
    fall = (1 + math.cos(math.pi * min(1.0, within))) / 2
    parts = {"tower": stage.tower, "reader": stage.reader}
    rates = {part: warm * (end + (start - end) * fall) for part, (start, end) in parts.items() if start > 0}
    return {part: max(rate, 1e-4) for part, rate in rates.items()}
