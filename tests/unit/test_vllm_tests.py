"""`make vllm-tests`: what it makes of two runs of vLLM's own tests, without running any."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """The script and its part that compares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "deploy" / "environment"))
        import vllm_tests
        import vllm_tests_compared

        yield vllm_tests, vllm_tests_compared
    for name in ("vllm_tests", "vllm_tests_compared", "setup_env"):
        sys.modules.pop(name, None)


@pytest.fixture
def script(modules: Any) -> Any:
    return modules[0]


@pytest.fixture
def compared(modules: Any) -> Any:
    return modules[1]


def outcomes(**found: str) -> dict[str, tuple[str, str]]:
    return {f"tests/a.py::{name}": (outcome, f"E {name}") for name, outcome in found.items()}


def test_tests_with_the_same_outcome_are_equal_and_counted_by_it(compared: Any) -> None:
    both = outcomes(one="passed", two="failed", three="skipped", four="passed")
    result = compared.compare(both, both, [])
    assert (result["ran_both_ways"], result["equal"], result["differing"]) == (4, 4, 0)
    assert result["equal_by_outcome"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert compared.passes(result)


def test_a_difference_without_a_reason_does_not_pass_and_shows_what_failed(compared: Any) -> None:
    result = compared.compare(outcomes(one="passed", two="passed"), outcomes(one="failed", two="passed"), [])
    assert (result["equal"], result["differing"]) == (1, 1)
    assert not compared.passes(result)
    shown = compared.text({"vllm": "0.32.0", **result})
    assert "tests/a.py::one: passed without, failed with" in shown
    assert "NO REASON: E one" in shown


@pytest.mark.parametrize("pattern", ["tests/a.py::one", "tests/a.py::*", "*::one"])
def test_a_difference_with_a_reason_passes(compared: Any, pattern: str) -> None:
    reasons = [compared.Reason(pattern, "Known.")]
    result = compared.compare(outcomes(one="passed"), outcomes(one="failed"), reasons)
    assert compared.passes(result)
    assert "    Known." in compared.text({"vllm": "0.32.0", **result}).splitlines()


def test_a_test_that_passes_only_with_the_plugin_is_a_difference_too(compared: Any) -> None:
    assert not compared.passes(compared.compare(outcomes(one="failed"), outcomes(one="passed"), []))


def test_a_test_that_ran_only_once_is_a_difference(compared: Any) -> None:
    result = compared.compare(outcomes(one="passed", two="passed"), outcomes(one="passed"), [])
    assert result["ran_both_ways"] == 1
    assert [each["with_plugin"] for each in result["differences"]] == ["did not run"]
    assert not compared.passes(result)


def test_a_reason_whose_tests_no_longer_differ_does_not_pass(compared: Any) -> None:
    both = outcomes(one="passed")
    result = compared.compare(
        both, both, [compared.Reason("*::one", "Known."), compared.Reason("*::nine", "Not run.")]
    )
    assert result["stale_reasons"] == ["*::one"]  # the other's tests were not among those that ran
    assert not compared.passes(result)
    assert "no longer differs" in compared.text({"vllm": "0.32.0", **result})


def test_brackets_of_parameters_are_no_pattern(compared: Any) -> None:
    assert compared.Reason("t.py::f[0.5-*]", "").covers("t.py::f[0.5-llava]")
    assert not compared.Reason("t.py::f[05]", "").covers("t.py::f0")


def test_the_list_of_reasons_can_be_read_and_each_is_a_sentence(compared: Any) -> None:
    for each in compared.read_reasons(compared.REASONS):
        assert each.tests.startswith("tests/")
        assert len(each.reason) > 20
        assert each.reason.endswith(".")


@pytest.mark.parametrize(
    ("only", "paths"),
    [
        ("renderers", ["renderers"]),
        ("renderers/test_hf.py", ["renderers/test_hf.py"]),
        ("multimodal/test_cache.py", ["multimodal/test_cache.py"]),
        ("multimodal/test_cache.py::test_x", ["multimodal/test_cache.py::test_x"]),
        ("v1", ["v1/metrics", "v1/ec_connector/unit", "v1/core"]),
        ("v1/core/test_output.py", ["v1/core/test_output.py"]),
    ],
)
def test_only_selects_what_lies_at_a_path_or_below(script: Any, only: str, paths: list[str]) -> None:
    assert [path for part in script.select(script.PARTS, [only]) for path in part.paths] == paths


def test_only_keeps_what_pytest_selects_by(script: Any) -> None:
    (part,) = script.select(script.PARTS, ["models/multimodal/processing/test_common.py"])
    assert part.keyword == script.FAMILIES


def test_only_refuses_what_is_not_run(script: Any) -> None:
    with pytest.raises(Exception, match="not among the tests that we run: lora"):
        script.select(script.PARTS, ["renderers", "lora"])
