"""``promprune bench prefill``: its arithmetic, on models small enough for a unit test."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from promprune_vllm.bench import prefill
from promprune_vllm.cli import app
from promprune_vllm.core.savings import Decoder

TINY = Decoder(layers=6, hidden=64, heads=2, kv_heads=1, head=32, intermediate=128)
CASES = {
    "one": prefill.Case("One", TINY, 1, 96, 8),
    "tiles": prefill.Case("Tiles", TINY, 3, 64, 8),
    "attention": prefill.Case("Attention", TINY, 1, 36, 8, patches=144),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "CASES", CASES)


def test_times_are_scaled_to_all_layers_and_the_selection_is_not() -> None:
    result = CliRunner().invoke(app, ["bench", "prefill", "--layers", "2", "--repeats", "1", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [(row["tokens"], row["kept"]) for row in document["cases"]] == [(96, 8), (192, 24), (36, 8)]
    for row in document["cases"]:
        times = {name: each["median"] for name, each in row["measured"].items()}
        assert row["full_ms"] == 3 * times["full"]
        assert row["native_ms"] == 3 * times["native"]
        assert row["selection_ms"] == {name: times[name] for name in ("ours", "plain", "divprune", "random")}
        saved = row["full_ms"] - row["native_ms"]
        for name, cost in row["selection_ms"].items():
            assert row["saving_kept"][name] == pytest.approx(1 - cost / saved)


def test_where_attention_is_computed_again_its_share_of_the_selection_is_told() -> None:
    result = CliRunner().invoke(app, ["bench", "prefill", "--repeats", "1", "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["model"]: row for row in json.loads(result.stdout)["cases"]}
    assert [rows[name]["attention_share"] for name in ("One", "Tiles")] == [None, None]
    times = rows["Attention"]["measured"]
    assert rows["Attention"]["attention_share"] == times["attention"]["median"] / times["ours"]["median"]


@pytest.mark.parametrize("name", CASES)
def test_only_promprune_asks_for_attention_and_all_select_as_many(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for module, path in ((prefill.ops, "kernels"), (prefill.plain, "plain")):
        received = module.received_attention
        monkeypatch.setattr(
            module, "received_attention", lambda *x, f=received, path=path: asked.append(path) or f(*x)
        )
    case = CASES[name]
    selections = prefill._selections(case, torch.device("cpu"), torch.float32)
    for variant in prefill.SELECTIONS:
        asked.clear()
        kept = selections[variant]()
        assert [tuple(rows.shape) for rows in kept] == [(case.keep, TINY.hidden)] * case.groups
        expected = {"ours": ["kernels"], "plain": ["plain"]}.get(variant, []) if case.patches else []
        assert asked == expected, variant
    assert ("attention" in selections) == bool(case.patches)


def test_the_table_says_how_many_layers_were_run() -> None:
    result = CliRunner().invoke(
        app, ["bench", "prefill", "--model", "tiles", "--layers", "1", "--repeats", "1"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert "Tiles" in result.output
    assert "1 of 6 layers run" in result.output
    assert "192 to 24" in result.output
    assert all(name in result.output for name in ("promprune", "attention in it", "divprune", "random"))


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--model", "two"], "must be one of one, tiles, attention, got two"), (["--device", "tpu"], "got 'tpu'")],
)
def test_what_is_not_there_is_refused(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "prefill", *options])
    assert result.exit_code == 2
    assert said in result.output
