"""``promprune bench kernels`` on small images."""

from __future__ import annotations

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from promprune_vllm import cli
from promprune_vllm.bench import kernel_cases, kernels, plain, spectra
from promprune_vllm.kernels import torch_greedy, torch_ops

run = CliRunner().invoke


@pytest.fixture
def one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "FAMILIES", {spectra.TIMED: spectra.FAMILIES[spectra.TIMED]})


@pytest.mark.usefixtures("one_family")
def test_measures_a_case_as_json_and_as_tables() -> None:
    arguments = ["bench", "kernels", "--repeats", "2", "--case", "2x60x80:9"]
    threads = torch.get_num_threads()
    shown = run(cli.app, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.output)
    (row,) = result["cases"]
    assert row["case"] == "2x60x80:9"
    assert set(row["whole"]) == {"ours", "reference", "plain"}
    assert all(0 <= time["min"] <= time["median"] <= time["max"] for time in row["whole"].values())
    assert {"machine", "cores", "versions", "command", "threads"} <= set(result)
    assert result["entropy"][0]["ours"]["error"] <= 2e-5
    assert torch.get_num_threads() == threads
    assert "PROMPRUNE_KERNELS" not in os.environ
    tables = run(cli.app, arguments, env={"COLUMNS": "250"})
    assert "2x60x80:9" in tables.output
    assert "plain / ours" in tables.output


@pytest.mark.parametrize("case", ["576", "576x4096", "axb:3", "1x2x3x4:5", "9x9:9", "9x9:0", "0x9x9:3"])
def test_refuses_a_case_it_cannot_measure(case: str) -> None:
    refused = run(cli.app, ["bench", "kernels", "--case", case])
    assert refused.exit_code == 2
    assert "--case" in refused.output


def test_says_that_there_is_no_gpu() -> None:
    if not torch.cuda.is_available():
        refused = run(cli.app, ["bench", "kernels", "--device", "cuda", "--case", "60x80:9"])
        assert refused.exit_code == 2
        assert "torch sees no CUDA device" in refused.output
    assert run(cli.app, ["bench", "kernels", "--device", "tpu"]).exit_code == 2


def test_says_what_memory_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.machine, "available_memory", lambda: 2**30)
    (row,) = [
        kernels._measure(case, 1, torch.float32, lambda _: 0.0)
        for case in kernel_cases.cases(["16384x3584:512"], large=False)
    ]
    assert row["skipped"] == "the reference needs about 11 GiB"


def test_the_plain_procedure_keeps_what_the_reference_keeps_where_nothing_is_close() -> None:
    x = spectra.features("white", 60, 80)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for given, keep in ((0, 20), (5, 20), (20, 20)):
        expected = torch_greedy.greedy_dpp(torch_ops.cosine_gram(x), order, torch.tensor(given), keep)
        assert plain.greedy(plain.kernel(x), order[:given], keep).tolist() == expected.tolist()
    assert float(plain.entropy_of(plain.centred_gram(x))) == pytest.approx(
        float(torch_ops.spectral_entropy(x)), abs=1e-5
    )
