"""What became of an image, kept beside its rows in the encoder cache, for whoever wants to see it.

The rows that entered the language model carry their own trace as an attribute, so it is theirs alone, costs a few
bytes for each unpruned token, and goes when they go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from promprune_vllm.engine.keys import TRACE
from promprune_vllm.engine.worker.encoded_image import SelectedTokens
from promprune_vllm.engine.worker.fault_isolation import cached_rows
from promprune_vllm.engine.worker.selection_metrics import seconds
from promprune_vllm.kernels.ops import descending_order


@dataclass(frozen=True, slots=True)
class Part:
    """A group of tokens that was selected from on its own statistics.

    Args:
        positions: ``(n,)`` int64, which rows of the image its tokens are.
        indices: ``(k,)`` int64, which of its tokens were kept.
        saliency: ``(n,)``, where the method looked at it.
        report: What the method tells of itself.
    """

    positions: Tensor
    indices: Tensor
    saliency: Tensor | None
    report: Mapping[str, Tensor]

    def as_json(self) -> dict[str, Any]:
        """Return plain numbers; waits for the device."""
        report = {name: value.item() for name, value in self.report.items()}
        salient: list[int] | None = None
        if self.saliency is not None and "saliency_tokens" in report:
            salient = self.positions[descending_order(self.saliency)[: int(report["saliency_tokens"])]].tolist()
        return {
            "positions": self.positions.tolist(),
            "kept": self.positions[self.indices].tolist(),
            "salient": salient,
            "saliency": None if self.saliency is None else self.saliency.double().tolist(),
            "report": report,
        }


@dataclass(frozen=True, slots=True)
class Trace:
    """What was chosen of one image.

    Args:
        method: Its name.
        parts: The groups that kept any.
        newlines: ``(s,)`` int64, newline rows that were kept.
        marks: When choosing began and ended, then gathering the rows.
    """

    method: str
    parts: tuple[Part, ...]
    newlines: Tensor
    marks: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, method: str, selected: SelectedTokens, marks: Sequence[Sequence[Any]]) -> Trace:
        """Remember a selection, but none of the features it was made from."""
        parts = tuple(
            Part(group.positions, selection.indices, group.features.saliency, selection.report)
            for group, selection in selected.parts
        )
        return cls(method, parts, selected.newlines, marks)

    def as_json(self) -> dict[str, Any]:
        """Return plain numbers; waits for the device."""
        return {
            "method": self.method,
            "parts": [part.as_json() for part in self.parts],
            "newlines": self.newlines.tolist(),
            "seconds": sum(seconds(start, end) for start, end in self.marks),
        }


def attach_trace(rows: Tensor, trace: Trace) -> None:
    """Attach an image's trace to its rows in the encoder cache."""
    setattr(rows, TRACE, trace)


def add_selection_traces(_: None) -> Any:
    """Return the method that tells the traces of images."""
    return _recall


def add_encoder_cache_size(_: None) -> Any:
    """Return the method that tells how much is held."""
    return _held


def _recall(worker: Any, identifiers: Sequence[str]) -> list[dict[str, Any] | None]:
    """Return what became of images, by their identifiers in the encoder cache.

    Returns:
        ``None`` for an image that is not there any more, ``{}`` for one that kept all its tokens.
    """
    rows = cached_rows(worker.model_runner)
    return [_told(rows.get(identifier)) for identifier in identifiers]


def _held(worker: Any) -> tuple[int, int]:
    """Return how many images the encoder cache holds, and how many rows they have."""
    rows = cached_rows(worker.model_runner)
    return len(rows), sum(len(each) for each in rows.values())


def _told(rows: Tensor | None) -> dict[str, Any] | None:
    if rows is None:
        return None
    trace: Trace | None = getattr(rows, TRACE, None)
    return {} if trace is None else trace.as_json()
