"""What the cells of tables of an evaluation say."""

from __future__ import annotations

import math

from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.statistics import Estimate

ALL_TOKENS = "all tokens"


def points(estimate: Estimate, form: str = ".1f") -> str:
    """Format an accuracy in percent, or a difference in points, with its standard error."""
    error = "" if math.isnan(estimate.error) else f" ± {100 * estimate.error:.1f}"
    return f"{100 * estimate.value + 0:{form}}{error}"


def named(method: str) -> str:
    """Return how tables name a method."""
    return ALL_TOKENS if method == FULL_METHOD else f"`{method}`"
