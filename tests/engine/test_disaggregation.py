"""Encoder and language model in two engines: what crosses between them is pruned already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from promprune_vllm.demo.families import build_family_model
from tests import runner
from tests.conftest import VISUAL_TOKENS
from tests.engine.conftest import Engine
from tests.engine.family_engine import FamilyEngine, Fed

pytestmark = [pytest.mark.engine, pytest.mark.release]
ASKS: tuple[tuple[str, int | None], ...] = (("coffee", None), ("coffee", 64), ("rocket", 16))
PRUNED = 11


def transfer(role: str, store: Path) -> Any:
    from vllm.config import ECTransferConfig

    return ECTransferConfig(
        ec_connector="ECExampleConnector",
        ec_role=role,
        ec_connector_extra_config={"shared_storage_path": str(store)},
    )


def answers(engine: Engine, prompts: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    outputs = engine.generate(prompts, tokens=4)
    return [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]


def sent_by(
    encoder: Engine, store: Path, prompts: Callable[[Any], list[dict[str, Any]]]
) -> tuple[list[torch.Tensor], int]:
    """The rows that an engine which only encodes sends, and the width that its connector was told of."""
    # On a GPU, V2 has a runner for such engines, and tests/runner gives it to them here.
    assert type(encoder.runner).__name__ == ("MMEncoderModelRunner" if runner.is_v2() else "CPUModelRunner")
    for prompt in prompts(encoder):  # one by one: a batch with a pruned image uses no graphs
        encoder.generate([prompt], tokens=1)
    told = encoder.llm.llm_engine.vllm_config.ec_transfer_config.mm_encoder_output_widths["image"]
    encoder.close()
    return [load_file(file)["ec_cache"] for file in store.rglob("*.safetensors")], told


@pytest.mark.parametrize(("cache_gb", "encoded"), [("0", 3), ("0.1", 2)])
def test_pruned_rows_cross_from_the_encoder_to_the_language_model(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_gb: str, encoded: int
) -> None:
    """With the feature cache, the engine that encodes does so once for both budgets of the coffee."""
    monkeypatch.setenv("PROMPRUNE_FEATURE_CACHE_GB", cache_gb)

    def make(**options: Any) -> Engine:
        return Engine(demo_model, **options)

    def prompts(engine: Engine) -> list[dict[str, Any]]:
        return [engine.prompt(ask) for ask in ASKS]

    alone = make()
    expected, width = answers(alone, prompts(alone)), alone.llm.model_config.get_inputs_embeds_size()
    alone.close()
    encoder = make(ec_transfer_config=transfer("ec_producer", tmp_path))
    calls: list[torch.Tensor] = []
    encoder.model.vision_tower.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    sent, told = sent_by(encoder, tmp_path, prompts)
    assert len(calls) == encoded
    calls.clear()
    assert sorted(len(rows) for rows in sent) == [16, 64, VISUAL_TOKENS]
    assert {rows.shape[1] for rows in sent} == {width} == {told}

    language = make(ec_transfer_config=transfer("ec_consumer", tmp_path))
    language.model.vision_tower.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    assert answers(language, prompts(language)) == expected
    assert not calls
    language.close()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_cross_with_the_rows(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connectors make room for rows of the one width that vLLM measures: pruned and whole images have it."""
    model, store = build_family_model(family, tmp_path / "model"), tmp_path / "store"
    store.mkdir()

    def make(**options: Any) -> FamilyEngine:
        return FamilyEngine(family, model, **options)

    def prompts(engine: FamilyEngine) -> list[dict[str, Any]]:
        return [engine.ask("landscape"), engine.ask("landscape", "portrait", budget=PRUNED, text="Which?")]

    def fed(engine: FamilyEngine) -> tuple[list[tuple[list[int], list[int]]], Fed]:
        with engine.fed() as seen:
            return answers(engine, prompts(engine)), seen

    alone = make()
    expected, there = fed(alone)
    whole = alone.tokens("landscape")
    alone.close()
    encoder = make(ec_transfer_config=transfer("ec_producer", store))
    graphs = encoder.give_encoder_graphs(monkeypatch)
    sent, told = sent_by(encoder, store, prompts)
    assert graphs.graph_misses == 1, "the whole image's rows are the manager's, the pruned images' the model's"
    assert sorted(len(rows) for rows in sent) == [PRUNED, PRUNED, whole]
    assert {rows.shape[1] for rows in sent} == {told}

    language = make(ec_transfer_config=transfer("ec_consumer", store))
    given, here = fed(language)
    language.close()
    assert given == expected
    assert here.tower_calls == 0
    assert torch.equal(torch.cat(here.positions, dim=-1), torch.cat(there.positions, dim=-1))
    assert torch.equal(torch.cat(here.embeds), torch.cat(there.embeds))
