"""The worker's metrics of selections: times, and what methods report about them.

Nothing here waits for a device. On CUDA, times come from events, and reports from one copy per encoder call. Both
are read on a later call, so the metrics lag by one call.

Both of vLLM's runners encode on the current stream, which also runs the model; V2's second stream only copies
outputs. So events and copies are in line with the kernels of the selections. To query an event while a CUDA graph
is captured would spoil the graph: vLLM captures at start-up, and the tower without ``embed_multimodal``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from promprune_vllm.engine.worker.selected_tokens import SelectedTokens
from promprune_vllm.metrics.recorder import Recorder


class SelectionMetrics:
    """Records the selections of one worker.

    Args:
        device: The model's device.
        recorder: Writes the metrics.
    """

    def __init__(self, device: torch.device, recorder: Recorder) -> None:
        self._recorder = recorder
        self._cuda = device.type == "cuda"
        self._times: list[tuple[str, str, Any, Any]] = []
        self._reports: list[tuple[str, str, Tensor]] = []
        self._copied: list[tuple[list[tuple[str, str]], Tensor, Any]] = []

    @contextmanager
    def measure_time(self, method: str, stage: str) -> Iterator[list[Any]]:
        """Measure how long the block takes, unless it raises.

        Yields:
            A list with a time mark of the block's start, and after the block also of its end; see ``seconds``.
        """
        marks = [self._mark()]
        yield marks
        marks.append(self._mark())
        self._times.append((method, stage, *marks))

    def record_reports(self, method: str, selected: SelectedTokens) -> None:
        """Record what a method reports about an image's selections."""
        for _, selection in selected.parts:
            report = selection.report
            if "spectral_entropy" in report:
                self._reports.append((method, "entropy", report["spectral_entropy"]))
            if "saliency_tokens" in report:
                share = report["saliency_tokens"] / len(selection.indices)
                self._reports.append((method, "saliency_share", share))

    def count_lookups(self, hits: int, misses: int) -> None:
        """Count images that were and were not in the feature cache."""
        self._recorder.feature_lookups(hits, misses)

    def record_stored_bytes(self, stored_bytes: int) -> None:
        """Record the size of the feature cache's images."""
        self._recorder.feature_store_bytes(stored_bytes)

    def flush(self, tokens: int) -> None:
        """Write everything that the device has finished to the metrics.

        Args:
            tokens: Unpruned tokens of the encoder call that has just ended; 0 if there was none.
        """
        if tokens:
            self._recorder.encoder_batch(tokens)
        if self._reports:
            values = torch.stack([value.double() for _, _, value in self._reports])  # (selections,)
            names = [(method, kind) for method, kind, _ in self._reports]
            # On CUDA, torch copies into pinned memory, behind the kernels that compute the values. Until the event
            # has passed, that memory holds anything.
            self._copied.append((names, values.to("cpu", non_blocking=True), self._mark()))
            self._reports.clear()
        while self._times and self._has_passed(self._times[0][3]):
            method, stage, start, end = self._times.pop(0)
            self._recorder.selection(method, stage, seconds(start, end))
        while self._copied and self._has_passed(self._copied[0][2]):
            names, values, _ = self._copied.pop(0)
            for (method, kind), value in zip(names, values.tolist(), strict=True):
                getattr(self._recorder, kind)(method, value)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _has_passed(self, mark: Any) -> bool:
        return not self._cuda or bool(mark.query())


def seconds(start: Any, end: Any) -> float:
    """Return the time between two marks; wait for the device if it has not reached the second one."""
    if isinstance(end, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end) / 1000)
