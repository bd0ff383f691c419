"""Every metric: name, type, labels, buckets, help. The one source for code, documents and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family.

    Args:
        name: As Prometheus shows it; counters end in ``_total``.
        kind: ``counter``, ``histogram`` or ``gauge``, of which the last value set in any process is shown.
        help: What it counts, for whoever reads ``/metrics``.
        label: The only label, if any, and every value it can take.
        buckets: Upper bounds of a histogram, in the unit of the name.
    """

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    help: str
    label: tuple[str, tuple[str, ...]] | None = None
    buckets: tuple[float, ...] = ()


OUTCOMES = ("pruned", "full", "text", "refused", "failed")

TOKENS_SEEN = Metric(
    "promprune_visual_tokens_seen_total",
    "counter",
    "Visual tokens of the images in accepted requests before pruning, cached images included.",
)
TOKENS_KEPT = Metric(
    "promprune_visual_tokens_kept_total",
    "counter",
    "Visual tokens of the images in accepted requests that enter the language model.",
)
REQUESTS = Metric(
    "promprune_requests_total",
    "counter",
    "Prompts by outcome: pruned (at least one image lost tokens), full (images kept every token), "
    "text (no image), refused (a visual token budget that cannot be honoured); and once more as failed if "
    "selecting the tokens of its images went wrong.",
    label=("outcome", OUTCOMES),
)
SELECTION_SECONDS = Metric(
    "promprune_selection_seconds",
    "histogram",
    "Time to choose the tokens of one image, once per encoded image (a cached image is not selected again).",
    # From a fused kernel (50 us) to a 16k-token image on a CPU (1 s).
    buckets=(5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0),
)

POLICY_LEVEL = Metric(
    "promprune_policy_level",
    "gauge",
    "Share of the default that images keep at the moment where nothing else is asked; below 1 under load.",
)

CATALOG = (TOKENS_SEEN, TOKENS_KEPT, REQUESTS, SELECTION_SECONDS, POLICY_LEVEL)
