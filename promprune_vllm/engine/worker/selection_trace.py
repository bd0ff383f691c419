"""Traces of selections for the inspector: which tokens of an image were kept, and why.

A trace is an attribute of the image's rows in the encoder cache. So it describes exactly the rows that entered the
language model, costs a few bytes per unpruned token, and is freed with the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from promprune_vllm.core.features import Need
from promprune_vllm.core.registry import Selector
from promprune_vllm.engine.keys import TRACE
from promprune_vllm.engine.worker.fault_isolation import cached_rows
from promprune_vllm.engine.worker.selected_tokens import SelectedTokens
from promprune_vllm.engine.worker.selection_metrics import seconds
from promprune_vllm.kernels.ops import descending_order


@dataclass(frozen=True, slots=True)
class Part:
    """The selection from one group of tokens.

    Args:
        positions: ``(n,)`` int64, positions of the group's tokens in the image.
        indices: ``(k,)`` int64, indices in the group of the kept tokens.
        saliency: ``(n,)``, or ``None`` if the method does not use it.
        report: Figures that the method reports about the selection.
    """

    positions: Tensor
    indices: Tensor
    saliency: Tensor | None
    report: Mapping[str, Tensor]

    def as_json(self) -> dict[str, Any]:
        """Return plain numbers; wait for the device."""
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
    """The selection from one image.

    Args:
        method: Name of the method.
        parts: The groups that kept any tokens.
        newlines: ``(s,)`` int64, positions of the kept newline rows.
        marks: Start and end of the selection, then start and end of assembling the rows.
    """

    method: str
    parts: tuple[Part, ...]
    newlines: Tensor
    marks: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, method: Selector, selected: SelectedTokens, marks: Sequence[Sequence[Any]]) -> Trace:
        """Return the trace of a selection. It keeps the saliency, but no other features."""
        used = Need.SALIENCY in method.needs  # it may have been captured for another method
        parts = tuple(
            Part(group.positions, selection.indices, group.features.saliency if used else None, selection.report)
            for group, selection in selected.parts
        )
        return cls(method.name, parts, selected.newlines, marks)

    def as_json(self) -> dict[str, Any]:
        """Return plain numbers; wait for the device."""
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
    """Return the worker method that returns the traces of images."""
    return _selection_traces


def add_encoder_cache_size(_: None) -> Any:
    """Return the worker method that returns the size of the encoder cache."""
    return _encoder_cache_size


def _selection_traces(worker: Any, identifiers: Sequence[str]) -> list[dict[str, Any] | None]:
    """Return the traces of images.

    Args:
        worker: vLLM's worker.
        identifiers: The images' identifiers in the encoder cache.

    Returns:
        Per image: its trace, ``{}`` if it kept all its tokens, ``None`` if it is no longer in the cache.
    """
    rows = cached_rows(worker.model_runner)
    return [_trace_of(rows.get(identifier)) for identifier in identifiers]


def _encoder_cache_size(worker: Any) -> tuple[int, int, tuple[int, int, int] | None]:
    """Return the encoder cache's images and their rows in total, and the feature cache's ``stored_images``."""
    rows = cached_rows(worker.model_runner)
    stored = worker.get_model().stored_images()
    return len(rows), sum(len(each) for each in rows.values()), stored


def _trace_of(rows: Tensor | None) -> dict[str, Any] | None:
    if rows is None:
        return None
    trace: Trace | None = getattr(rows, TRACE, None)
    return {} if trace is None else trace.as_json()
