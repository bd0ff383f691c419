"""What the worker tells the metrics about selections: times, and what methods report of them.

Nothing here waits for a device. On CUDA times come from events and reports through one copy per call of the
encoder, and both are read when a later call comes by; so the last call's are shown with the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from promprune_vllm.engine.worker.encoded_image import SelectedTokens
from promprune_vllm.metrics.recorder import Recorder


class SelectionMetrics:
    """Observes the selections of one worker.

    Args:
        device: Where the model is.
        recorder: Writes the metrics.
    """

    def __init__(self, device: torch.device, recorder: Recorder) -> None:
        self._recorder = recorder
        self._cuda = device.type == "cuda"
        self._times: list[tuple[str, str, Any, Any]] = []
        self._reports: list[tuple[str, str, Tensor]] = []
        self._copied: list[tuple[list[tuple[str, str]], Tensor, Any]] = []

    @contextmanager
    def timing(self, method: str, stage: str) -> Iterator[list[Any]]:
        """Observe how long the block takes; not where it fails. Yields the marks at its start and end."""
        marks = [self._mark()]
        yield marks
        marks.append(self._mark())
        self._times.append((method, stage, *marks))

    def selected(self, method: str, selected: SelectedTokens) -> None:
        """Note what a method reports of an image's selections."""
        for _, selection in selected.parts:
            report = selection.report
            if "spectral_entropy" in report:
                self._reports.append((method, "entropy", report["spectral_entropy"]))
            if "saliency_tokens" in report:
                share = report["saliency_tokens"] / len(selection.indices)
                self._reports.append((method, "saliency_share", share))

    def flush(self, tokens: int) -> None:
        """Observe all that is known by now, at the end of an encoder call of so many unpruned tokens."""
        self._recorder.encoder_batch(tokens)
        if self._reports:
            values = torch.stack([value.double() for _, _, value in self._reports])  # (selections,)
            names = [(method, kind) for method, kind, _ in self._reports]
            # On CUDA the copy goes to pinned memory behind the work that makes the values.
            self._copied.append((names, values.to("cpu", non_blocking=True), self._mark()))
            self._reports.clear()
        while self._times and self._is_over(self._times[0][3]):
            method, stage, start, end = self._times.pop(0)
            self._recorder.selection(method, stage, seconds(start, end))
        while self._copied and self._is_over(self._copied[0][2]):
            names, values, _ = self._copied.pop(0)
            for (method, kind), value in zip(names, values.tolist(), strict=True):
                getattr(self._recorder, kind)(method, value)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _is_over(self, mark: Any) -> bool:
        return not self._cuda or bool(mark.query())


def seconds(start: Any, end: Any) -> float:
    """Return the time between two marks; waits for the device where the second is still to come."""
    if isinstance(end, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end) / 1000)
