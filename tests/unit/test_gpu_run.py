"""`promprune bench gpu`: its report is complete at any moment, time is shared, and figures reach the documents."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.documents import gpu as documents
from promprune_vllm.bench.gpu import child, kernel_tests, text
from promprune_vllm.bench.gpu.clock import Cost, Deadline, allowance
from promprune_vllm.bench.gpu.figures import figures
from promprune_vllm.bench.gpu.report import JSON, MARKDOWN, Report, read
from promprune_vllm.bench.gpu.run import run_stages
from promprune_vllm.bench.gpu.shapes import GROUPS, SHAPES
from promprune_vllm.bench.gpu.stages import Stage, stages
from promprune_vllm.bench.prefill import CASES, FREE, SELECTIONS
from promprune_vllm.cli import app
from promprune_vllm.errors import BenchError
from tests.documents import ROOT

BY = {
    "machine": "a processor",
    "cores": 16,
    "commit": "abc",
    "command": "promprune bench gpu --out gpu",
    "time": "2026-12-01T10:00:00+00:00",
    "versions": {"torch": "2.13.0", "triton": "3.7.1"},
}
HEAD = {"shape": "7b", "device": "cuda", "minutes": 8.0, "provenance": BY}
GPU = {
    **BY,
    "gpu": "NVIDIA H200",
    "gpus": 1,
    "memory_bytes": 139 * 2**30,
    "capability": "9.0",
    "driver": "580.1",
    "cuda": "13.0",
}
TIMES = {"median": 0.5, "min": 0.4, "max": 12.34}
WAYS = ("eager", "graph", "plain", "received attention, eager", "received attention, graph")
Results = Generator[dict[str, Any], None, None]


def kernel(case: str, median: float = 0.5) -> dict[str, Any]:
    whole = {name: {**TIMES, "median": median} for name in (WAYS if case.startswith("1") else WAYS[:3])}
    return {
        "features": "bfloat16",
        "cases": [{"case": case, "whole": whole, "other_tokens": 0, "memory_bytes": 2**20}],
    }


def prefilled(model: str) -> dict[str, Any]:
    row = {
        "model": model,
        "tokens": 576,
        "kept": 64,
        "layers": 32,
        "layers_run": 32,
        "full_ms": 50.0,
        "native_ms": 10.0,
        "selection_ms": dict(zip(SELECTIONS, (1.0, 20.0, 0.6, 0.04), strict=True)),
        "saving_kept": dict(zip(SELECTIONS, (0.975, 0.5, 0.985, 0.999), strict=True)),
        "attention_share": None if model.startswith("LLaVA") else 0.3,
    }
    return {"cases": [row]}


def served(*loads: tuple[int, object, float]) -> dict[str, Any]:
    rows = [
        {
            "concurrency": flight,
            "budget": budget,
            "kept_share": 1.0,
            "requests_per_second": rate,
            "ttft_p50_ms": 100.0,
            "ttft_p99_ms": 200.0,
            "kv_blocks_mean": 1000.0,
            "kv_blocks_max": 0.0,
            "ratios": {"requests_per_second": 1.0, "ttft_p50_ms": 1.0},
        }
        for flight, budget, rate in loads
    ]
    engine = {
        "model": "LLaVA-1.5-7B",
        "vocabulary": 320,
        "command": "promprune serve MODEL",
        "model_runner": "V2",
        "cuda_graphs": True,
        "kv_blocks": 12345,
        "block_tokens": 16,
    }
    return {**engine, "rows": rows}


def after_tests() -> dict[str, Any]:
    return {"passed": 80, "failed": 0, "skipped": 1, "failures": [], "command": "pytest tests/kernels"}


RUN = {
    "environment": GPU,
    "tests": after_tests(),
    "kernels 576x4096:64": kernel("576x4096:64"),
    "kernels 1296x3584:256": kernel("1296x3584:256"),
    "prefill llava-1.5-7b": prefilled("LLaVA-1.5-7B"),
    "prefill qwen2.5-vl-7b": prefilled("Qwen2.5-VL-7B"),
    "vllm": served((256, "full", 20.0), (256, 64, 50.0)),
}


def write(folder: Path, results: dict[str, Any], **head: Any) -> Path:
    """A real report of a run that measured something."""
    report = Report(folder, {**HEAD, **head}, list(results))
    for name, result in results.items():
        if result is not None:
            report.put(name, "done", seconds=1.0, result=result)
    report.end(12.3)
    return folder


def stage(name: str, measure: Callable[[Deadline], Results], least: float = 0.1, missing: str = "") -> Stage:
    return Stage(name, Cost(least, 1), measure, missing)


def run(plan: list[Stage], folder: Path, seconds: float = 60) -> tuple[Report, list[str]]:
    report, told = Report(folder, HEAD, [each.name for each in plan]), []
    run_stages(plan, report, Deadline.after(seconds), told.append)
    return report, told


def complete(folder: Path) -> dict[str, Any]:
    """The report in a folder, whose two files must be whole and agree."""
    document = read(folder)
    shown = (folder / MARKDOWN).read_text()
    assert shown == text.markdown(document)
    assert all(f"| {each['name']} | {each['state']} |" in shown for each in document["stages"])
    return document


def test_both_files_are_complete_whenever_something_was_measured(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def look(_: Deadline) -> Results:
        seen.append(complete(tmp_path))
        yield served((256, "full", 20.0))
        seen.append(complete(tmp_path))
        yield served((256, "full", 20.0), (256, 64, 50.0))

    run([stage("environment", lambda _: (yield GPU)), stage("vllm", look)], tmp_path)
    states = [[each["state"] for each in document["stages"]] for document in (*seen, complete(tmp_path))]
    assert states == [["done", "running"], ["done", "running"], ["done", "done"]]
    assert [len(figures(document)["vllm"]) for document in (*seen, complete(tmp_path))] == [0, 1, 2]
    assert "**It has not ended**" in (tmp_path / MARKDOWN).read_text()
    assert {each.name for each in tmp_path.iterdir()} == {JSON, MARKDOWN}


def test_a_stage_that_fails_keeps_what_it_measured_and_the_next_one_runs(tmp_path: Path) -> None:
    def fail(_: Deadline) -> Results:
        yield after_tests()
        raise BenchError("pytest said\nmany\nthings")

    def late(_: Deadline) -> Results:
        yield served((1, "full", 3.0))
        raise TimeoutError("no time for the next load")

    plan = [stage("tests", fail), stage("vllm", late), stage("kernels 576x4096:64", lambda _: (yield kernel("a")))]
    report, told = run([*plan, stage("prefill x", fail, missing="no torch")], tmp_path)
    document = complete(tmp_path)
    assert [each["state"] for each in document["stages"]] == ["failed", "cut off", "done", "skipped"]
    assert document["stages"][0]["why"] == "BenchError: pytest said\nmany\nthings"
    assert document["stages"][0]["result"] == after_tests()
    assert len(figures(document)["vllm"]) == 1
    assert "| BenchError: pytest said … things |" in (tmp_path / MARKDOWN).read_text()
    assert report.names("failed", "cut off") == ["tests", "vllm"]
    assert told[0].startswith("tests: at most")
    assert told[1].startswith("tests: failed: BenchError")


def test_a_run_that_is_ended_says_so(tmp_path: Path) -> None:
    def end(_: Deadline) -> Results:
        yield after_tests()
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run([stage("tests", end), stage("vllm", end)], tmp_path)
    document = complete(tmp_path)
    assert [each["state"] for each in document["stages"]] == ["cut off", "waiting"]
    assert document["stages"][0]["why"] == "the run was ended: SystemExit 143"
    assert document["ended"] is False


def test_a_stage_that_no_longer_fits_is_skipped_and_named(tmp_path: Path) -> None:
    plan = [
        stage("tests", lambda _: (yield after_tests()), least=99),
        stage("kernels x", lambda _: (yield kernel("x"))),
    ]
    run(plan, tmp_path, seconds=50)
    skipped, ran = complete(tmp_path)["stages"]
    assert (skipped["state"], ran["state"]) == ("skipped", "done")
    assert re.fullmatch(r"it no longer fits: it needs about 99 s, and \d+ s are left", skipped["why"])


@pytest.mark.parametrize(
    ("costs", "seconds", "expected"),
    [
        ([Cost(10, 1)], 100, 100),
        ([Cost(10, 1)], 9, 0),
        ([Cost(10, 1), Cost(50, 3)], 100, 20),
        ([Cost(10, 1), Cost(95, 3)], 100, 100),  # the second does not fit: the first has everything
        ([Cost(10, 1), Cost(95, 3), Cost(40, 1)], 100, 35),  # but a smaller one behind it does
    ],
)
def test_time_is_divided_by_need_and_then_by_share(costs: list[Cost], seconds: float, expected: float) -> None:
    assert allowance(costs, seconds) == pytest.approx(expected)


def test_every_stage_of_the_full_run_fits_into_eight_minutes() -> None:
    shape = SHAPES["7b"]
    names = [each.name for each in stages(shape, "cuda", Path())]
    assert sorted({name.split()[0] for name in names}, key=GROUPS.index) == list(GROUPS)
    assert sum(shape.costs[name.split()[0]].least for name in names) <= 480 - 25
    assert [each.name for each in stages(shape, "cuda", Path(), ["kernels"])][:2] == [
        "environment",
        "kernels 576x4096:64",
    ]
    assert set(shape.prefill) | set(SHAPES["tiny"].prefill) == CASES.keys()
    folder = ROOT / "tests" / "kernels"
    for each in SHAPES.values():
        assert all((folder / name.partition("::")[0]).is_file() for name in each.tests)


def test_a_deadline_runs_out() -> None:
    Deadline.after(60).require(10, "a load")
    with pytest.raises(TimeoutError, match="a load needs about 10 s, and 0 s are left"):
        Deadline(time.monotonic() - 1).require(10, "a load")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('{}'); sys.exit('CUDA error: an illegal access')", r"status 1:\nCUDA error"),
        ("print('no document')", "printed no JSON"),
    ],
)
def test_a_command_that_fails_shows_its_end(code: str, said: str) -> None:
    with pytest.raises(BenchError, match=said):
        child.json_of((sys.executable, "-c", code), Deadline.after(60))


def test_the_outcomes_of_pytest_are_counted_up_to_where_it_was_stopped() -> None:
    output = """\
tests/kernels/test_triton.py::test_one[a b-torch.float32] PASSED [  6%]
tests/kernels/test_triton.py::test_two FAILED [ 12%]
tests/kernels/test_triton.py::test_three SKIPPED (needs a GPU) [ 18%]
tests/kernels/test_triton.py::test_four ERROR [ 25%]
tests/kernels/test_triton.py::test_five \
"""
    failures = ["tests/kernels/test_triton.py::test_two", "tests/kernels/test_triton.py::test_four"]
    assert kernel_tests.outcomes(output) == {"passed": 1, "failed": 2, "skipped": 1, "failures": failures}


def test_a_report_is_never_replaced(tmp_path: Path) -> None:
    write(tmp_path, RUN)
    before = (tmp_path / JSON).read_text()
    with pytest.raises(BenchError, match="already has a report"):
        Report(tmp_path, HEAD, [])
    assert (tmp_path / JSON).read_text() == before


def test_figures_reach_the_documents_with_their_machine_and_command(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    rows = documents.record(write(tmp_path / "run", RUN), results)
    assert rows == [
        *("tests tests", "kernels 576x4096:64", "kernels 1296x3584:256", "prefill LLaVA-1.5-7B"),
        *("prefill Qwen2.5-VL-7B", "vllm 256 in flight, full", "vllm 256 in flight, 64"),
    ]
    source = (
        "NVIDIA H200 (compute capability 9.0, driver 580.1, CUDA 13.0; torch 2.13.0, triton 3.7.1), commit abc, "
        "2026-12-01: `promprune bench gpu --out gpu`"
    )
    blocks = [
        documents.kernel_tests_markdown(results),
        documents.kernels_markdown(results),
        documents.prefill_markdown(results),
        documents.vllm_markdown(results),
    ]
    assert all(source in block for block in blocks)
    assert blocks[0].startswith("The kernel tests on a GPU: 80 passed, 0 failed, 1 skipped.")
    spread = "0.50 (0.40 … 12.3)"
    assert f"| 576x4096:64, LLaVA-1.5-7B | {spread} | {spread} | {spread} | 1.0 ms |" in blocks[1]
    assert f"| 1296x3584:256, received attention | {spread} | {spread} | - | - |" in blocks[1]
    assert "| 5x576x4096:64, LLaVA-NeXT-7B | not measured yet |" in blocks[1]
    others = "20.0 (50.0%) | 0.60 (98.5%) | 0.04 (99.9%) | 90% |"
    assert f"| LLaVA-1.5-7B | 576 to 64 | 50.0 | 10.0 | 1.00 (97.5%) | - | {others}" in blocks[2]
    assert f"| 576 to 64 | 50.0 | 10.0 | 1.00 (97.5%) | 30% | {others}" in blocks[2]
    assert text.PREFILL_COLUMNS[-3:] == ("plain", *(f"`{method}`" for method in FREE))
    assert len({line.count("|") for line in blocks[2].splitlines() if line.startswith("| ")}) == 1
    assert "| Qwen3-VL-8B, with received attention | 1024 to 256 | not measured yet |" in blocks[2]
    assert "| 256 | 64 | 100% | 50.00 (1.00x) | 100 ms (1.00x) | 200 ms | 1,000 | ? |" in blocks[3]
    assert "Model Runner V2, CUDA graphs, 12,345 KV blocks of 16 tokens" in blocks[3]
    summary = documents.summary_markdown(results)
    assert summary.startswith("On one NVIDIA H200, that takes 0.50 ms, or 0.50 ms from a CUDA graph. LLaVA-1.5-7B")
    assert "50.0 requests/s with a budget of 64, and 20.0 without" in summary
    ran = "On NVIDIA H200 ran: the tests of the Triton kernels, the selection, vLLM"
    assert documents.coverage_markdown(results).startswith(ran)


def test_a_later_run_replaces_what_it_measured_again_and_keeps_the_rest(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    documents.record(write(tmp_path / "first", RUN), results)
    cut = {
        "environment": {**GPU, "gpu": "NVIDIA L4"},
        "tests": None,
        "kernels 576x4096:64": kernel("576x4096:64", median=9.0),
        "vllm": served((256, "full", 1.0)),
    }
    documents.record(write(tmp_path / "second", cut), results)
    kept = documents.read(results)
    machines = {
        f"{name} {row}": value["source"]["gpu"] for name, each in kept.items() for row, value in each.items()
    }
    assert {row for row, machine in machines.items() if machine == "NVIDIA L4"} == {
        *("kernels 576x4096:64", "vllm 256 in flight, full"),
    }
    assert len(machines) == 7
    shown = documents.kernels_markdown(results)
    assert "* 576x4096:64: measured on NVIDIA L4 (" in shown
    assert "* 1296x3584:256: measured on NVIDIA H200 (" in shown
    # Two runs' figures are never compared with each other.
    assert "**What a budget gains in vLLM was not measured on a GPU yet**" in documents.summary_markdown(results)


@pytest.mark.parametrize(
    ("results", "head", "said"),
    [
        (RUN, {"device": "cpu", "shape": "tiny"}, "is a rehearsal"),
        ({**RUN, "environment": None}, {}, "does not say which GPU"),
        ({"environment": GPU, "vllm": None}, {}, "no stage measured anything"),
    ],
)
def test_what_shows_nothing_is_not_recorded(
    results: dict[str, Any], head: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(BenchError, match=said):
        documents.record(write(tmp_path / "run", results, **head), tmp_path / "gpu.json")
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("contents", [None, "{", '{"kind": "other"}', "[]"])
def test_what_is_no_report_is_refused(contents: str | None, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / JSON).write_text(contents)
    with pytest.raises(BenchError, match="report of `promprune bench gpu`"):
        read(tmp_path)


def test_before_the_first_run_the_documents_say_so(tmp_path: Path) -> None:
    nothing = tmp_path / "gpu.json"
    assert "**No GPU was available**" in documents.kernel_tests_markdown(nothing)
    assert documents.kernels_markdown(nothing).count("not measured yet") == 3 * len(SHAPES["7b"].kernels)
    assert "**it has not been measured yet**" in documents.prefill_markdown(nothing)
    assert "**vLLM has not run with this plugin on a GPU yet**" in documents.vllm_markdown(nothing)
    assert "**no GPU was available**" in documents.summary_markdown(nothing)
    assert "None of them has run on a GPU yet" in documents.coverage_markdown(nothing)


def test_a_run_without_the_timed_case_or_vllm_says_what_is_missing(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    documents.record(write(tmp_path / "run", {"environment": GPU, "tests": after_tests()}), results)
    summary = documents.summary_markdown(results)
    assert summary.startswith(
        "Selection was not timed on a GPU yet. **What a budget gains in vLLM was not measured on a GPU yet**"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "tpu"], "must be cpu or cuda"),
        (["--device", "cpu"], "would take hours on a CPU"),
        (["--device", "cpu", "--shape", "huge"], "--shape must be one of 7b, tiny"),
        (["--device", "cpu", "--shape", "tiny", "--only", "vlm"], "--only must be one of environment, tests"),
    ],
)
def test_what_cannot_be_run_is_refused(options: list[str], said: str, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["bench", "gpu", "--out", str(tmp_path / "run"), *options])
    assert refused.exit_code == 2
    assert said in refused.output
    assert not (tmp_path / "run").exists()


def test_a_report_is_plain_json(tmp_path: Path) -> None:
    document = json.loads((write(tmp_path, RUN) / JSON).read_text())
    assert document == read(tmp_path)
    assert (document["kind"], document["ended"], document["seconds"]) == ("gpu", True, 12.3)
