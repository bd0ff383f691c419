"""What a metric is, and every label that one can have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from promprune_vllm.errors import BudgetReason

UNPRUNED = "none"
"""Value of the label ``method`` for images and videos that keep every token: no method runs on them."""
MODALITIES = ("image", "video")
OUTCOMES = ("pruned", "full", "text", "refused", "failed")
REASONS: tuple[str, ...] = get_args(BudgetReason)
FORMS = ("tokens", "share", "full", "auto", "per_frame", "list", "total")
STAGES = ("choose", "assemble")
DECISIONS = ("sure", "asked_again", "no_room", "failed")
DISCARDED = ("prompt", "visual", "answer")
RESULTS = ("hit", "miss")
AUDITS = ("audited", "busy", "no_space", "too_long", "refused", "unsupported", "unanswered", "failed")
SIZES = ("1024", "4096", "larger")
KEPT = ("12.5%", "25%", "50%", "100%")
LABELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "model_name": ("the name the model is served under, as in vLLM's own series", ()),
    "method": (f"a method the server allows; `{UNPRUNED}` for images and videos that keep every token", ()),
    "modality": ("what has the visual tokens", MODALITIES),
    "pruned": ("whether the prompt lost visual tokens", ("true", "false")),
    "outcome": ("how the prompt was handled", OUTCOMES),
    "reason": ("why a budget was refused", REASONS),
    "form": ("what kind of budget was sent", FORMS),
    "stage": ("stage of a selection", STAGES),
    "decision": ("whether a first answer was good enough", DECISIONS),
    "tokens": ("which tokens; the visual ones are among those of the prompt", DISCARDED),
    "cached": ("whether the image or video came from vLLM's processor cache", ("true", "false")),
    "audit": ("what became of an audit", AUDITS),
    "kept": ("share of a prompt's visual tokens that was kept, as the upper bound of its class", KEPT),
    "size": ("visual tokens of a prompt's largest image before pruning, at most", SIZES),
    "agrees": ("whether all visual tokens would have said the same", ("true", "false")),
    "result": ("whether the feature cache had the image or video", RESULTS),
    "version": ("version of promprune-vllm", ()),
    "vllm_version": ("version of vLLM", ()),
    "vllm_tested": ("whether this release was tested with that very version", ("true", "false")),
    "part": ("a part of promprune-vllm that depends on code of vLLM", ()),
}
"""Label -> its meaning, and every value it can take; no values if they depend on the server's settings."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family.

    Args:
        name: Name in Prometheus; counters end in ``_total``.
        kind: ``counter``, ``histogram`` or ``gauge``.
        help: What it measures, as shown in ``/metrics``.
        labels: Label names, keys of ``LABELS``.
        buckets: Upper bounds of a histogram's buckets, in the unit of its name.
        unpruned: Whether the label ``method`` can also be ``none``.
        derived: Whether it is shown only for models whose sizes are known.
        combine: Whether a gauge shows the lowest value of all processes, or their sum.
    """

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    help: str
    labels: tuple[str, ...] = ("model_name",)
    buckets: tuple[float, ...] = ()
    unpruned: bool = False
    derived: bool = False
    combine: Literal["min", "sum"] = "min"

    def series(self, model_name: str, methods: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """Yield the label values of every series that a server of one model can have; none for ``build_info``."""
        if "version" in self.labels:
            return
        values = {name: possible for name, (_, possible) in LABELS.items()}
        values["model_name"] = (model_name,)
        values["method"] = (*methods, UNPRUNED) if self.unpruned else tuple(methods)
        yield from product(*(values[label] for label in self.labels))
