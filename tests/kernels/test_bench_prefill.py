"""``promprune bench prefill``: its arithmetic, on models small enough for a unit test."""

from __future__ import annotations

import json

import pytest
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
        assert row["selection_ms"] == {name: times[name] for name in ("ours", "plain")}
        saved = row["full_ms"] - row["native_ms"]
        assert row["saving_kept"]["ours"] == pytest.approx(1 - times["ours"] / saved)


def test_the_table_says_how_many_layers_were_run() -> None:
    result = CliRunner().invoke(
        app, ["bench", "prefill", "--model", "tiles", "--layers", "1", "--repeats", "1"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert "Tiles, 1 of 6 layers run" in result.output
    assert "192 to 24" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--model", "two"], "must be one of one, tiles, attention, got two"), (["--device", "tpu"], "got 'tpu'")],
)
def test_what_is_not_there_is_refused(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "prefill", *options])
    assert result.exit_code == 2
    assert said in result.output
