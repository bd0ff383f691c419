"""Between schedule and launch, nothing of ours waits for the GPU: the code of families, from tower to positions.

``tests/kernels/test_no_sync.py`` has the methods and their kernels, ``tests/waits.py`` how a wait is found.
"""

from __future__ import annotations

import contextvars
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from promprune_vllm import VisionFeatures, get_method, methods
from promprune_vllm.engine.keys import COUNTS
from promprune_vllm.engine.worker import device_copies
from promprune_vllm.engine.worker.encoded_image import EncodedImage, PruneJob
from tests import runner
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine, shared_engine
from tests.engine.family_facts import KINDS, TILED
from tests.waits import EIGENVALUES, GPU, NoWaits, to_gpu

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> FamilyEngine:
    return shared_engine(request.param, models[request.param])


@pytest.fixture
def mrope(engine: FamilyEngine) -> FamilyEngine:
    if not engine.mrope:
        pytest.skip("there is nothing to write: positions are counted anew over the kept tokens")
    if not runner.is_v2():
        pytest.skip("Model Runner V1 keeps positions on the CPU")
    return engine


def from_the_tower(engine: FamilyEngine, shape: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What our code gets of an image from its tower, with the features on the GPU and the sizes on the host."""

    def moved(value: Any) -> Any:
        if isinstance(value, VisionFeatures):
            return replace(value, **{each.name: moved(getattr(value, each.name)) for each in fields(value)})
        if isinstance(value, Tensor):
            return to_gpu(value) if value.is_floating_point() else value.clone()  # not of inference mode
        return [*map(moved, value)] if isinstance(value, list) and not isinstance(value[0], int) else value

    caught: list[Any] = []
    original = engine.model._image
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "_image", lambda *given: caught.extend(given) or original(*given))
        engine.encoded(shape)
    return [to_gpu(value) if isinstance(value, dict) else moved(value) for value in caught]


def on_gpu(engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine's model, as if its weights were on the GPU, as far as our code touches them."""
    model = engine.model
    width = engine.encoded("square").groups[0].features.projected.shape[1]
    for name, parameter in model.named_parameters(recurse=False):  # such as LLaVA-NeXT's newline
        monkeypatch.setitem(model._parameters, name, to_gpu(parameter.detach()))
    monkeypatch.setattr(model, "project", lambda rows: rows.new_empty((len(rows), width)))  # vLLM's code
    monkeypatch.setattr(model, "_metrics", None)
    return model


def select_all(model: Any, image: EncodedImage, names: list[str]) -> None:
    """Select by each method, and nearly all of the image by the first: then LLaVA-NeXT keeps newlines."""
    text = image.rows.new_empty((5, image.groups[0].features.projected.shape[1]))
    total = len(image.rows)
    for name, kept in [(names[0], total - 1), *((name, 9) for name in names)]:
        rows = model.select(image.with_text(text), PruneJob(total, kept, get_method(name)))()
        assert rows.device == GPU
        assert len(rows) == kept


def test_between_the_tower_and_the_language_model_nothing_waits(
    engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every method; the reference's solver of eigenvalues is not in the kernels for CUDA."""
    given = from_the_tower(engine, "landscape", monkeypatch)
    model = on_gpu(engine, monkeypatch)
    with NoWaits([EIGENVALUES]):
        select_all(model, model._image(*given), ["uniform", *methods(over_frames=False)])


@pytest.mark.parametrize("tiles", ["merged", "base"])
@pytest.mark.parametrize("engine", TILED, indirect=True)
def test_neither_does_another_way_to_divide_tiles(
    engine: FamilyEngine, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = from_the_tower(engine, "landscape", monkeypatch)
    model = on_gpu(engine, monkeypatch)
    monkeypatch.setattr(model, "_settings", model._settings.model_copy(update={"tiles": tiles}))
    with NoWaits([EIGENVALUES]):
        select_all(model, model._image(*given), ["promprune"])


def test_what_the_host_reads_of_an_image_stays_there(
    engine: FamilyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, requests = engine.llm.llm_engine.engine_core, []
    original = client.add_request
    monkeypatch.setattr(client, "add_request", lambda request: requests.append(request) or original(request))
    engine.forget()
    engine.generate([engine.ask("landscape", budget=9)], tokens=1)
    ((image,),) = [request.mm_features for request in requests]
    kept = {name for name, element in image.data.items() if element.field.keep_on_cpu}
    inputs = engine.inputs("landscape", raw=False)  # normalised pixels, and sizes or counts
    sizes = {name for name, values in inputs.items() if not torch.is_floating_point(values[0])}
    assert sizes
    assert kept >= {COUNTS, *sizes}


@pytest.mark.parametrize("budget", [9, None])
def test_positions_are_written_without_a_wait(
    mrope: FamilyEngine, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In real steps, before each real call: a call with everything on the GPU that Model Runner V2 keeps there."""
    model, deltas = mrope.model, []
    original = model.recompute_mrope_positions

    def without_values(**given: Any) -> Any:
        moved = to_gpu(given)
        with torch.inference_mode(False), torch.no_grad(), NoWaits():
            return original(**moved)

    def recompute(**given: Any) -> Any:
        positions = given["mrope_positions"]
        # In a copy of the context, so that the real call finds what was noted for it.
        bare, moved, delta = contextvars.copy_context().run(without_values, **given)
        assert moved.shape == positions.shape
        assert {rows.device for rows in (*bare, moved)} == {GPU}
        real = original(**given)
        deltas.append((delta, real[2], int(real[1][:, -1].max()) + 1 - positions.shape[1]))
        return real

    monkeypatch.setattr(model, "recompute_mrope_positions", recompute)
    mrope.forget()
    mrope.generate([mrope.ask("portrait", "square", budget=budget), mrope.ask("square", budget=budget)], tokens=3)
    assert len(deltas) >= 2
    assert all(moved == real == by_positions for moved, real, by_positions in deltas)


def test_copies_to_a_gpu_are_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes for what a CPU has not: from other memory, CUDA copies while the host waits."""
    log: list[Any] = []
    values = torch.arange(3)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: log.append("fake pinned") or self)

    def fake_to(values: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        log.append((device.type, non_blocking))
        return values

    monkeypatch.setattr(Tensor, "to", fake_to)
    for available, pinned in ((True, ["fake pinned"]), (False, [])):
        log.clear()
        monkeypatch.setattr(device_copies, "is_pin_memory_available", lambda available=available: available)
        device_copies.copy_to_device(values, torch.device("cuda"))
        assert log == [*pinned, ("cuda", True)]
