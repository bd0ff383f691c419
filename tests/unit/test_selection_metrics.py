"""The worker's metrics on a GPU: read when the device is done with them, and never waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from promprune_vllm import Selection, VisionFeatures
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.selected_tokens import SelectedTokens
from promprune_vllm.engine.worker.selection_metrics import SelectionMetrics
from promprune_vllm.metrics.recorder import Recorder
from tests.unit.test_metrics import samples

CHOSEN = "promprune_selection_seconds_count", "promprune", "choose"
ENTROPY = "promprune_spectral_entropy_count", "promprune"
BATCHES = ("promprune_encoder_batch_tokens_count",)


class FakeStream:
    """A GPU's stream, which does nothing until told to: there is none on a CPU."""

    def __init__(self) -> None:
        self.recorded = self.reached = 0


class FakeEvent:
    """A CUDA event that is asked for a time only when its stream has passed it."""

    def __init__(self, stream: FakeStream) -> None:
        self._stream = stream
        self.place: int | None = None

    def record(self) -> None:
        self._stream.recorded += 1
        self.place = self._stream.recorded

    def query(self) -> bool:
        assert self.place is not None
        return self.place <= self._stream.reached

    def synchronize(self) -> None:
        assert self.query(), "the host would wait"

    def elapsed_time(self, end: Any) -> float:
        self.synchronize()
        end.synchronize()
        return 2.0  # milliseconds


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    stream = FakeStream()

    def event(*, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(stream)

    monkeypatch.setattr(torch.cuda, "Event", event)
    return stream


def encode_one(metrics: SelectionMetrics) -> None:
    """Record what one call of the encoder, with one image, does."""
    features = VisionFeatures(projected=torch.zeros(4, 2), grid=(1, 2, 2))
    image = EncodedImage.whole(features.projected, features)
    with metrics.measure_time("promprune", "choose"):
        report = {"spectral_entropy": torch.tensor(0.5)}
        selected = SelectedTokens(
            image.rows, [(image.groups[0], Selection(torch.arange(2), report=report))], image.newlines
        )
    metrics.record_reports("promprune", selected)
    metrics.flush(4)


def test_on_a_gpu_they_are_read_on_a_later_call(stream: FakeStream, tmp_path: Path) -> None:
    metrics = SelectionMetrics(torch.device("cuda"), Recorder(str(tmp_path), "demo"))

    def seen() -> tuple[float, float, float]:
        shown = samples(tmp_path)
        return shown.get(CHOSEN, 0), shown.get(ENTROPY, 0), shown.get(BATCHES, 0)

    encode_one(metrics)  # three events: start, end, copy
    assert stream.recorded == 3
    assert seen() == (0, 0, 1), "the device has done nothing yet"
    stream.reached = 1
    encode_one(metrics)
    assert seen() == (0, 0, 2), "it is within the first selection"
    stream.reached = 2
    encode_one(metrics)
    assert seen() == (1, 0, 3), "it has not copied the first report"
    stream.reached = 6
    encode_one(metrics)
    assert seen() == (2, 2, 4)
    assert samples(tmp_path)["promprune_selection_seconds_sum", "promprune", "choose"] == 0.004


def test_a_selection_that_fails_has_no_time(stream: FakeStream, tmp_path: Path) -> None:
    metrics = SelectionMetrics(torch.device("cuda"), Recorder(str(tmp_path), "demo"))
    with pytest.raises(ZeroDivisionError), metrics.measure_time("promprune", "choose"):
        raise ZeroDivisionError
    encode_one(metrics)
    stream.reached = stream.recorded
    encode_one(metrics)
    assert samples(tmp_path)[CHOSEN] == 1
