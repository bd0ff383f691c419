"""The feature cache in LLaVA-1.5's engine: what leaves it, what never enters it, and that it changes no answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promprune_vllm import Need, get_method
from promprune_vllm.config import Settings
from promprune_vllm.demo import PHOTOS
from promprune_vllm.engine.compat import feature_cache, parts
from promprune_vllm.engine.keys import CACHE_SIZE_METHOD, COUNTS, IDENTITY, TRACES_METHOD
from promprune_vllm.engine.worker import fault_isolation
from promprune_vllm.engine.worker.encode import runs, sources
from promprune_vllm.engine.worker.encoded_image import PruneJob
from promprune_vllm.engine.worker.feature_store import FeatureStore
from promprune_vllm.engine.worker.packed_image import Packing
from promprune_vllm.errors import SettingsError
from tests.conftest import VISUAL_TOKENS
from tests.engine.conftest import DEMO, Engine
from tests.engine.storing import evict, storing

pytestmark = pytest.mark.engine
TOGETHER = DEMO
REQUESTS = 500


@pytest.fixture
def store(engine: Engine) -> Iterator[FeatureStore]:
    with storing(engine) as made:
        yield made


def calls(engine: Engine, *asks: tuple[str, int | None]) -> list[int]:
    """Images of each call of the tower for some requests."""
    with engine.watched() as seen:
        engine.generate([engine.prompt(ask) for ask in asks], tokens=1)
    return seen.images_per_tower_call


def processed(engine: Engine) -> list[Any]:
    """An image's fields as they leave the processor, in each request of several."""
    renderer = engine.llm.llm_engine.input_processor.renderer
    original, items = renderer.mm_processor.apply, []

    def apply(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        items.extend(result["mm_kwargs"]["image"])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renderer.mm_processor, "apply", apply)
        engine.generate([engine.prompt(("coffee", budget)) for budget in (64, 64, 65, None)], tokens=1)
    return items


def test_off_it_costs_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def agree(_: Any) -> Any:
        raise AssertionError("ranks talked")

    engine.forget()
    monkeypatch.setattr(fault_isolation, "agree", agree)
    monkeypatch.setattr(engine.model, "_several_ranks", True)
    assert Settings().feature_cache_gb == 0
    assert engine.model._store is None
    assert engine.model.stored_images() is None
    items = [item for item in processed(engine) if item is not None]
    assert items
    assert all(COUNTS in item and IDENTITY not in item for item in items)


def test_an_image_has_one_identity_whatever_its_budget(engine: Engine, store: FeatureStore) -> None:
    sent = [item[IDENTITY].data for item in processed(engine) if item is not None]
    assert len(sent) >= 3
    assert all(each.shape == (16,) and each.dtype == torch.uint8 for each in sent)
    assert all(torch.equal(each, sent[0]) for each in sent)
    assert len(store) == 1


def test_an_image_beside_one_that_vllm_has_processed_is_told_by_its_own_identity(
    engine: Engine, store: FeatureStore
) -> None:
    assert calls(engine, ("coffee", 64)) == [1]
    engine.generate([engine.prompt(("coffee", 64), ("rocket", 64))], tokens=1)
    assert len(store) == 2
    evict(engine)
    assert calls(engine, ("rocket", 65)) == []


def test_without_the_processor_cache_images_have_identities_too(
    engine: Engine, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls(engine, ("coffee", 64))
    ((before, _),) = store._images
    renderer = engine.llm.llm_engine.input_processor.renderer
    monkeypatch.setattr(renderer, "_mm_processor_cache", None)
    monkeypatch.setattr(renderer.mm_processor, "cache", None, raising=False)  # where vLLM before 0.31 has it
    (*_, sent) = processed(engine)
    assert bytes(sent[IDENTITY].data.tolist()) == before


def test_what_resets_vllms_encoder_cache_empties_it(engine: Engine, store: FeatureStore) -> None:
    """And new weights, however they come."""
    weights: list[tuple[str, torch.Tensor]] = []
    ways: list[Callable[[], Any]] = [
        engine.core.reset_encoder_cache,
        engine.runner.reset_encoder_cache,
        lambda: engine.model.load_weights(weights),
    ]
    if hasattr(engine.runner, "reload_weights"):  # Model Runner V2 has it since vLLM 0.32
        ways.append(lambda: engine.core.model_executor.collective_rpc("reload_weights"))
    for reset in ways:
        assert calls(engine, ("coffee", 64)) == [1]
        assert len(store) == 1
        reset()
        assert (len(store), store.bytes) == (0, 0)
        engine.llm.reset_prefix_cache()
        engine.core.reset_encoder_cache()


def test_it_is_refused_where_vllm_hashes_no_images(engine: Engine) -> None:
    """Every request's image would be a new one."""
    config = engine.llm.llm_engine.vllm_config
    on = Settings(feature_cache_gb=1)
    feature_cache.require_hashes(config, on)

    def without(processor_cache_gb: float, *, prefixes: bool) -> Any:
        multimodal = SimpleNamespace(mm_processor_cache_gb=processor_cache_gb)
        return SimpleNamespace(
            model_config=SimpleNamespace(multimodal_config=multimodal),
            cache_config=SimpleNamespace(enable_prefix_caching=prefixes),
        )

    feature_cache.require_hashes(without(4, prefixes=False), on)
    feature_cache.require_hashes(without(0, prefixes=True), on)
    feature_cache.require_hashes(without(0, prefixes=False), Settings())
    with pytest.raises(SettingsError, match=r"--visual-token-feature-cache-gb .*then hashes no images"):
        feature_cache.require_hashes(without(0, prefixes=False), on)


def test_with_a_part_of_vllm_that_has_changed_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Settings(feature_cache_gb=0.5)
    assert feature_cache.capacity_bytes(on) == 1 << 29
    moved = SimpleNamespace(is_off=lambda part: part is parts.FEATURE_CACHE)
    monkeypatch.setattr(feature_cache.verdict, "current", lambda: moved)
    assert feature_cache.capacity_bytes(on) == 0


def test_an_image_that_lacks_a_feature_is_a_miss(
    engine: Engine, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model, "_methods", [get_method("divprune")])
    assert calls(engine, ("coffee", 64)) == [1]
    monkeypatch.setattr(engine.model, "_methods", [get_method("promprune")])
    assert Need.SALIENCY in get_method("promprune").needs
    evict(engine)
    assert calls(engine, ("coffee", None)) == []
    evict(engine)
    assert calls(engine, ("coffee", 64)) == [1]
    evict(engine)
    assert calls(engine, ("coffee", 65)) == []
    assert len(store) == 1


def test_ranks_encode_what_any_of_them_lacks(
    engine: Engine, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an image is stored on one rank alone, the ranks would otherwise wait for each other forever."""
    assert calls(engine, ("coffee", 64)) == [1]
    asked: list[list[bool]] = []

    def agree(found: list[Any]) -> list[Any]:
        asked.append([image is not None for image in found])
        return [None for _ in found]

    monkeypatch.setattr(engine.model, "_several_ranks", True)
    monkeypatch.setattr(fault_isolation, "agree", agree)
    evict(engine)
    assert calls(engine, ("coffee", 65)) == [1]
    assert asked == [[True]]


def test_the_worker_tells_what_is_stored(engine: Engine, store: FeatureStore) -> None:
    engine.generate([engine.prompt((photo, 64)) for photo in PHOTOS[:2]], tokens=1)
    ((images, rows, stored),) = engine.core.model_executor.collective_rpc(CACHE_SIZE_METHOD)
    assert (images, rows) == (2, 128)
    assert stored == (2, store.bytes, store.capacity_bytes)


def test_a_trace_has_the_saliency_only_where_the_method_uses_it(
    engine: Engine, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored images have what other methods use."""
    told = []
    for name in ("promprune", "divprune"):
        monkeypatch.setattr(engine.model, "_methods", [get_method(name), get_method("promprune")])
        evict(engine)
        engine.generate([engine.prompt(("coffee", 64))], tokens=1)
        ((trace,),) = engine.core.model_executor.collective_rpc(TRACES_METHOD, args=([*engine.rows()],))
        told.append((trace["method"], trace["parts"][0]["saliency"] is None))
    assert told == [("promprune", False), ("divprune", True)]
    assert len(store) == 1


def test_rows_of_all_tokens_keep_nothing_else_in_memory(engine: Engine, store: FeatureStore) -> None:
    """vLLM's encoder cache counts them alone."""
    for _ in range(2):
        engine.generate([engine.prompt((photo, None)) for photo in PHOTOS[:2]], tokens=1)
        for rows in engine.rows().values():
            assert rows.untyped_storage().nbytes() == VISUAL_TOKENS * rows.shape[1] * rows.element_size()
        evict(engine)


@pytest.mark.release
def test_many_requests_over_a_small_store_are_answered_as_without(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets, methods, texts and images at random; the store holds three of four images."""
    names = ("promprune", "divprune", "prumerge", "cdpruner", "visionzip")
    processor = engine.llm.llm_engine.input_processor.renderer.mm_processor
    monkeypatch.setenv("PROMPRUNE_ALLOW_METHODS", ",".join(names))
    methods = type(processor._methods).of(processor.info.ctx.model_config)
    monkeypatch.setattr(processor, "_methods", methods)
    monkeypatch.setattr(engine.model, "_methods", list(methods.selectors))
    draw = random.Random(0)
    settings = [(5, names[0]), *((64, name) for name in names), (None, "")]
    kinds = [
        (photo, *each, text) for photo in PHOTOS for each in settings for text in ("What is it?", "How many?")
    ]

    def prompt(photo: str, budget: int | None, method: str, text: str) -> dict[str, Any]:
        made = engine.prompt((photo, budget), question=text)
        if budget is not None:
            made["mm_processor_kwargs"]["visual_token_method"] = method
        return made

    expected: dict[Any, list[int]] = {}
    for kind in kinds:
        engine.forget()
        expected[kind] = list(engine.generate([prompt(*kind)], tokens=2)[0].outputs[0].token_ids)
    with torch.inference_mode():
        (image,) = engine.model.capture(
            {"pixel_values": engine.pixels("coffee")}, slice(0, 1), engine.model._captured([])
        )
    size = Packing(image).bytes
    most, encoded, found = 3 * size, 0, []
    monkeypatch.setattr(engine.model._metrics, "count_lookups", lambda *counts: found.append(counts))
    with storing(engine, most + size - 1) as store:
        for _ in range(REQUESTS // 4):
            if draw.random() < 0.7:
                evict(engine)
            asked = [draw.choice(kinds) for _ in range(4)]
            with engine.watched() as seen:
                outputs = engine.generate([prompt(*kind) for kind in asked], tokens=2)
            encoded += sum(seen.images_per_tower_call)
            assert [list(output.outputs[0].token_ids) for output in outputs] == [expected[kind] for kind in asked]
            assert store.bytes == sum(packed.bytes for packed in store._images.values()) <= most
            assert len(store) <= 3
    hits, misses = (sum(counts) for counts in zip(*found, strict=True))
    assert misses == encoded > len(PHOTOS)
    assert hits > 50


IMAGE: Any = object()


def job(number: int | None) -> PruneJob:
    return PruneJob(9, 3, get_method("random"), key=None if number is None else (bytes(16), number))


@pytest.mark.parametrize(
    ("numbers", "found", "expected"),
    [
        ((1, 2, 1), (), [0, 1, 0]),
        ((1, 1, 1), (0,), [0, 1, 1]),  # the first was found, and may lack what the second needs
        ((1, 1, 1), (1,), [0, 1, 0]),
        ((None, None), (), [0, 1]),
    ],
)
def test_of_jobs_for_one_missing_image_the_first_encodes_it(
    numbers: tuple[int | None, ...], found: tuple[int, ...], expected: list[int]
) -> None:
    there = [IMAGE if i in found else None for i in range(len(numbers))]
    assert sources([job(number) for number in numbers], there) == expected


@given(st.sets(st.integers(0, 30)))
def test_runs_are_as_long_as_can_be(indices: set[int]) -> None:
    made = list(runs(sorted(indices)))
    assert [i for run in made for i in range(run.start, run.stop)] == sorted(indices)
    assert all(a.stop < b.start for a, b in pairwise(made))
