"""Suggests PromPrune's ``mu`` from the spectral entropies of many images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

SATURATION = 3.0
"""Distance from ``mu``, in units of ``tau``, beyond which one of the two stages gets over 95% of the budget."""
SHARES = MappingProxyType(
    {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
)


@dataclass(frozen=True, slots=True)
class MeasuredImage:
    """One image, measured with the served model's encoder.

    Args:
        file: File name.
        tokens: Visual tokens before pruning.
        entropies: H of each group a method selects from: one, or one per tile.
        folder: Its folder, if several were measured.
    """

    file: str
    tokens: int
    entropies: tuple[float, ...]
    folder: str = ""


@dataclass(frozen=True, slots=True)
class SkippedImage:
    """One file that could not be measured, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """The entropies of the images of one or more folders, under the settings of a server.

    Args:
        model: Name of the model as the operator gave it.
        images: The measured images, at least one.
        skipped: Files that could not be measured.
        options: PromPrune's effective options, including the family's calibration.
        chosen: The options the operator set.
        tiles: How images split into tiles are pruned.
    """

    model: str
    images: Sequence[MeasuredImage]
    skipped: Sequence[SkippedImage]
    options: Mapping[str, Any]
    chosen: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    tiles: str = "own"

    @property
    def entropies(self) -> list[float]:
        """H of every group of every image, in ascending order."""
        return sorted(entropy for image in self.images for entropy in image.entropies)

    @property
    def median(self) -> float:
        """The median of H over all groups."""
        return round(quantile(self.entropies, 0.5), 4)

    @property
    def medians(self) -> dict[str, float]:
        """The median of H in each folder, in ascending order."""
        folders: dict[str, list[float]] = {}
        for image in self.images:
            folders.setdefault(image.folder, []).extend(image.entropies)
        by_folder = {name: round(quantile(sorted(values), 0.5), 4) for name, values in folders.items()}
        return dict(sorted(by_folder.items(), key=lambda item: item[1]))

    @property
    def mu(self) -> float:
        """The suggested ``mu``: midway between the lowest and the highest folder median, or the only median.

        The median of a mixture depends on how many images of each kind it has; the midpoint does not.
        """
        medians = [*self.medians.values()]
        return round((medians[0] + medians[-1]) / 2, 4) if len(medians) > 1 else self.median

    def saturated(self, mu: float) -> float:
        """Return the share of groups so far from ``mu`` that their split hardly depends on H."""
        distance = SATURATION * float(self.options["tau"])
        entropies = self.entropies
        return sum(abs(entropy - mu) > distance for entropy in entropies) / len(entropies)

    def method_options(self) -> dict[str, Any]:
        """Return the options to start a server with: the operator's own, with the new ``mu``."""
        return {**self.chosen, "mu": self.mu}

    def as_document(self) -> dict[str, Any]:
        """Return the whole report, ready for JSON."""
        tokens, entropies = sorted(image.tokens for image in self.images), self.entropies
        current_mu = float(self.options["mu"])
        return {
            "model": self.model,
            "mu": self.mu,
            "median": self.median,
            "medians": self.medians,
            "method_options": self.method_options(),
            "options_in_force": dict(self.options),
            "tiles": self.tiles,
            "groups": len(entropies),
            "tokens": {name: quantile(tokens, SHARES[name]) for name in ("min", "median", "max")},
            "entropy": {name: quantile(entropies, share) for name, share in SHARES.items()},
            "saturated_share": {"mu": self.saturated(self.mu), "mu_in_force": self.saturated(current_mu)},
            "images": [
                {
                    **({"folder": image.folder} if image.folder else {}),
                    "file": image.file,
                    "tokens": image.tokens,
                    "entropies": list(image.entropies),
                }
                for image in self.images
            ],
            "skipped": [{"file": image.file, "reason": image.reason} for image in self.skipped],
        }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of values in ascending order, by linear interpolation."""
    position = share * (len(ordered) - 1)
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    return below + (above - below) * (position - math.floor(position))


def histogram(values: Sequence[float], bins: int) -> list[tuple[float, int]]:
    """Count values in bins of equal width from the smallest to the largest.

    Returns:
        The lower edge and the count of each bin; a single bin if all values are equal.
    """
    low, high = min(values), max(values)
    if high == low:
        return [(low, len(values))]
    width = (high - low) / bins
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    return [(low + i * width, count) for i, count in enumerate(counts)]
